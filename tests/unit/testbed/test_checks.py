import pytest

from forgetscale.ops.checks import CHECKS, passes, passes_all, split_words
from forgetscale.ops.format_checks import FORMAT_CHECKS

CASES = [
    ({"kind": "equals", "text": "a b"}, " a b\n", "a b c"),
    ({"kind": "one_of", "options": ["yes", "no"]}, "yes", "yes no"),
    ({"kind": "starts_with", "text": "so it"}, "so it goes.", "so its end"),
    ({"kind": "ends_with", "text": "over"}, "a b over ", "over a"),
    ({"kind": "contains", "words": ["a", "b"]}, "b, c a.", "a c"),
    ({"kind": "excludes", "words": ["a"]}, "ab c", "c a."),
    ({"kind": "num_words", "min": 2, "max": 3}, "a, b", "a b c d"),
    ({"kind": "num_sentences", "min": 1, "max": 1}, "a b.", "a. b."),
    ({"kind": "sequence", "words": ["a", "b"]}, "a, b.", "b a"),
    ({"kind": "words_from", "words": ["a", "b", "c"]}, "c a", "a a"),
    ({"kind": "uppercase"}, "A B", "A b"),
]


@pytest.mark.parametrize(("check", "good", "bad"), CASES)
def test_each_kind_accepts_and_rejects(check, good, bad):
    assert passes(check, good)
    assert not passes(check, bad)


def test_every_kind_is_covered_here():
    assert {check["kind"] for check, _, _ in CASES} == set(CHECKS) - set(FORMAT_CHECKS)


def test_words_drop_punctuation():
    assert split_words(' "a", b.  c? ,') == ["a", "b", "c"]


def test_an_empty_answer_names_no_word():
    assert not passes({"kind": "words_from", "words": ["a"]}, " ")


def test_errors_name_the_nearest_kind_and_the_argument():
    with pytest.raises(ValueError, match="nearest: 'equals'"):
        passes({"kind": "equal", "text": "a"}, "a")
    with pytest.raises(ValueError, match="no argument 'text'"):
        passes({"kind": "equals"}, "a")
    with pytest.raises(ValueError, match="nothing is measured"):
        passes_all([], "a")

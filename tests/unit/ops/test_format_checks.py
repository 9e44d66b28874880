"""Verifiable instructions: each kind with an answer that follows it and one that does not."""

from __future__ import annotations

import pytest

from forgetscale.ops.checks import CHECKS, passes
from forgetscale.ops.format_checks import FORMAT_CHECKS

CASES = [
    ({"kind": "keyword_count", "word": "Nepal", "min": 2}, "nepal is Nepal.", "Nepalese Nepal"),
    ({"kind": "keyword_count", "word": "a.b", "max": 0}, "aXb", "see a.b there"),
    ({"kind": "letter_count", "letter": "e", "min": 2, "max": 3}, "Eve", "eel eel"),
    ({"kind": "num_paragraphs", "min": 2, "max": 2}, "one\n\ntwo\n", "one\ntwo"),
    ({"kind": "num_paragraphs", "min": 3, "max": 3}, "a\n***\nb\n\nx\n***\nc", "a\n***\nb"),
    ({"kind": "num_bullets", "min": 3, "max": 3}, "- a\n* b\n1. c", "- a\n- b\nc - d"),
    ({"kind": "num_highlights", "min": 2}, "*one* and **two words**", "*one* and 2 * 3"),
    ({"kind": "num_placeholders", "min": 1}, "Dear [name],", "Dear name []"),
    ({"kind": "num_capital_words", "min": 2, "max": 2}, "NASA and ESA met", "Nasa and ESA"),
    ({"kind": "lowercase"}, "all low, 3 words", "Not low"),
    ({"kind": "no_comma"}, "no such mark", "one, two"),
    ({"kind": "quoted"}, ' "said so" ', '"said so'),
    ({"kind": "title"}, "<<A title>>\ntext", "<A title>\ntext"),
    ({"kind": "postscript"}, "text\nP.S. more", "text P.S. more"),
    ({"kind": "postscript", "marker": "P.P.S"}, "P.P.S more", "P.S. more"),
    ({"kind": "json"}, '```json\n{"a": [1]}\n```', "{'a': 1}"),
    ({"kind": "two_answers"}, "one\n******\ntwo", "one\n******\none"),
]


@pytest.mark.parametrize(("check", "good", "bad"), CASES, ids=lambda v: str(v)[:40])
def test_a_check_tells_followed_from_not(check, good, bad):
    assert passes(check, good)
    assert not passes(check, bad)


def test_every_kind_has_a_case_and_a_place():
    assert {check["kind"] for check, _, _ in CASES} == set(FORMAT_CHECKS)
    assert set(FORMAT_CHECKS) < set(CHECKS)


def test_an_empty_answer_follows_nothing_that_asks_for_something():
    for check, _, _ in CASES:
        if check["kind"] not in ("no_comma",) and check.get("min", 1):
            if check.get("max") != 0:
                assert not passes(check, ""), check


def test_a_missing_argument_is_named():
    with pytest.raises(ValueError, match="'keyword_count' has no argument 'word'"):
        passes({"kind": "keyword_count"}, "x")

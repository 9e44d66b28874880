"""IFEval: our verdicts are those of the published checkers, over made-up and awkward answers."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from forgetscale.errors import DataError
from forgetscale.evaluation import ifeval_text, load_chat_task
from forgetscale.evaluation.forced import MeasureSettings
from forgetscale.evaluation.ifeval import INSTRUCTIONS, follows, follows_loosely, loose_forms
from forgetscale.evaluation.ifeval_text import language_of, split_sentences
from forgetscale.evaluation.tasks import ChatTask, Question
from forgetscale.evaluation.text_measures import ifeval_measures

pytest.importorskip("lm_eval", reason="pip install 'forgetscale[eval]'")
nltk = pytest.importorskip("nltk", reason="pip install 'forgetscale[eval]'")
pytest.importorskip("langdetect", reason="pip install 'forgetscale[eval]'")

PIECES = [
    *("the cat sat on a mat", "The NASA probe left", "I'M SURE. DON'T GO", "a WELL-KNOWN fact"),
    *("one, two, three", "Nepal and nepal; NEPALESE", "Dr. Smith met Mr. Jones in the U.S. army"),
    *("It costs 3.50 today! Does it? Yes...", 'He said "go." (She went.) Then', "e.g. this"),
    *("* a point", "- a dash", "  * indented", "** not one", "*", "---", "1. numbered"),
    *("*high*", "**very high**", "* spaced *", "**", "****", "a * b * c", "*a**b*"),
    *("***", " *** ", "******", "<<title>>", "<< >>", "<<a>> and <<b>>", "[name]", "[]", "[a] [b]"),
    *(
        "P.S. more",
        "p. s. x",
        "P.P.S more",
        "p. p. s",
        "Section 1",
        "SECTION 2",
        "Section3",
        "Section",
    ),
    *("My answer is yes.", "My answer is maybe", '"', '"quoted"', "```json", "```", '{"a": [1]}'),
    *(
        "{'a': 1}",
        "[1, 2]",
        "null",
        "Any other questions?",
        'any OTHER questions?"',
        "say it twice",
    ),
    *("", "", " ", "\t", '\'"cat" walks', "Cat, the", "eee EEE", "été", "ሰላም ለዓለም", "straße ẞ İ"),
]
JOINS = ["\n", "\n", "\n\n", " ", " ", "\n\n\n", ". ", "\n***\n"]
LONG = [
    "The committee met on Tuesday to discuss the plans for the new library in the old town.",
    "the committee met on tuesday to discuss the plans for the new library in the old town.",
    "WE WENT TO THE SHOP AND THEN WE WERE HOME WITH ALL OF OUR THINGS BEFORE THE RAIN.",
    "Der Ausschuss hat am Dienstag über die neue Bibliothek in der alten Stadt gesprochen.",
    "der ausschuss hat am dienstag über die neue bibliothek in der alten stadt gesprochen.",
    "Le comité s'est réuni mardi pour parler de la nouvelle bibliothèque de la vieille ville.",
    "नेपालको राजधानी काठमाडौं हो र त्यहाँ धेरै मन्दिरहरू छन्",
    "12345 67890",
]
RELATIONS = ("less than", "at least")
# What is slow to judge sees every n-th answer.
SPARED = {
    "language:response_language": 150,
    "change_case:english_capital": 30,
    "change_case:english_lowercase": 30,
    "change_case:capital_word_frequency": 16,
    "length_constraints:number_sentences": 9,
    "length_constraints:number_words": 3,
}


def arguments_of(name: str) -> list[dict[str, Any]]:
    """Arguments of an instruction at which verdicts over the answers go both ways."""
    counted = {
        "length_constraints:number_sentences": "num_sentences",
        "length_constraints:number_words": "num_words",
    }
    if name in counted:
        numbers = (1, 2, 4, 9)
        return [{counted[name]: n, "relation": r} for n in numbers for r in RELATIONS]
    return {
        "keywords:existence": [{"keywords": ["cat"]}, {"keywords": ["nepal", "CAT"]}],
        "keywords:frequency": [
            {"keyword": k, "frequency": n, "relation": r}
            for k in ("nepal", " cat ")
            for n in (1, 2)
            for r in RELATIONS
        ],
        "keywords:forbidden_words": [{"forbidden_words": ["nepal", "sat"]}],
        "keywords:letter_frequency": [
            {"letter": c, "let_frequency": n, "let_relation": r}
            for c in ("e", "S")
            for n in (1, 4)
            for r in RELATIONS
        ],
        "language:response_language": [{"language": code} for code in ("en", "ne")],
        "length_constraints:number_paragraphs": [{"num_paragraphs": n} for n in (1, 2, 3)],
        "length_constraints:nth_paragraph_first_word": [
            {"num_paragraphs": 2, "nth_paragraph": 1, "first_word": "The"},
            {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "cat"},
            {"num_paragraphs": 1, "nth_paragraph": 1, "first_word": "cat"},
        ],
        "detectable_content:number_placeholders": [{"num_placeholders": n} for n in (1, 2)],
        "detectable_content:postscript": [
            {"postscript_marker": m} for m in ("P.S.", "P.P.S", " Note")
        ],
        "detectable_format:number_bullet_lists": [{"num_bullets": n} for n in (1, 2, 3)],
        "detectable_format:number_highlighted_sections": [{"num_highlights": n} for n in (1, 2)],
        "detectable_format:multiple_sections": [
            {"section_spliter": s, "num_sections": n}
            for s in ("Section", "SECTION ")
            for n in (1, 2)
        ],
        "combination:repeat_prompt": [{"prompt_to_repeat": "The cat sat "}],
        "startend:end_checker": [{"end_phrase": "Any other questions? "}],
        "change_case:capital_word_frequency": [
            {"capital_frequency": n, "capital_relation": r} for n in (1, 3) for r in RELATIONS
        ],
    }.get(name, [{}])


def answers() -> list[str]:
    draw = random.Random(7)
    made = []
    for _ in range(400):
        text = draw.choice(PIECES)
        for _ in range(draw.randint(0, 7)):
            text += draw.choice(JOINS) + draw.choice(PIECES)
        made.append(text)
    wrapped = [f'"{text}"' for text in made[:20]] + [f"```json\n{text}\n```" for text in PIECES]
    led = [f"Sure:\n{text}\nBye" for text in made[:20]]
    starts = [f"The cat sat {text}" for text in made[:10]]
    ends = [f"{text} any other questions?" for text in made[:10]]
    twice = [f"{a}******{b}" for a, b in zip(PIECES[:12], PIECES[1:13], strict=True)]
    return [*made, *PIECES, *LONG, *wrapped, *led, *starts, *ends, *twice]


@pytest.fixture(scope="module")
def published() -> Any:
    """The checkers inside lm-evaluation-harness, without a download.

    Its learned sentence model comes from a network; the same algorithm with our lists
    stands in for it in the two instructions that count sentences or words in capitals.
    """
    from nltk.tokenize.destructive import NLTKWordTokenizer

    splitter, words = ifeval_text._sentence_splitter(), NLTKWordTokenizer()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nltk, "download", lambda *arguments: False)
        from lm_eval.tasks.ifeval import instructions_util, utils

        patch.setattr(instructions_util, "_get_sentence_tokenizer", lambda: splitter)
        patch.setattr(
            nltk,
            "word_tokenize",
            lambda text: [
                word for each in splitter.tokenize(text) for word in words.tokenize(each)
            ],
        )
        from langdetect import DetectorFactory

        patch.setattr(DetectorFactory, "seed", 0)
        yield utils


def theirs(published: Any, check: dict[str, Any], answer: str) -> tuple[bool, bool]:
    example = published.InputExample(
        0, [check["kind"]], "", [{k: v for k, v in check.items() if k != "kind"}]
    )
    strict = published.test_instruction_following_strict(example, answer)
    loose = published.test_instruction_following_loose(example, answer)
    return strict.follow_instruction_list[0], loose.follow_instruction_list[0]


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_verdicts_are_the_published_ones(published: Any, name: str) -> None:
    texts = LONG + answers()[:: SPARED.get(name, 1)]
    found = []
    for arguments in arguments_of(name):
        check = {"kind": name, **arguments}
        for text in texts:
            ours = follows(check, text), follows_loosely(check, text)
            assert ours == theirs(published, check, text), (check, text)
            found.append(ours)
    assert {strict for strict, _ in found} == {True, False}, "verdicts must go both ways"
    assert all(loose for strict, loose in found if strict)


def test_all_kinds_of_the_published_list_are_there(published: Any) -> None:
    from lm_eval.tasks.ifeval.instructions_registry import INSTRUCTION_DICT

    assert set(INSTRUCTIONS) == set(INSTRUCTION_DICT) and len(INSTRUCTIONS) == 25


def test_loose_forms_are_the_eight_published_ones() -> None:
    forms = list(loose_forms("first *a*\nmiddle\nlast"))
    assert len(forms) == 8
    assert "middle" in forms and "first a\nmiddle\nlast" in forms
    check = {"kind": "startend:end_checker", "end_phrase": "middle"}
    assert follows_loosely(check, "first\nmiddle\nlast") and not follows(check, "first\nmiddle\nx")


def test_where_ours_is_stricter() -> None:
    """Text is text: theirs reads keywords as regular expressions and letters as a-z only."""
    assert not follows({"kind": "keywords:existence", "keywords": ["a.b"]}, "axb")
    marks = {"kind": "keywords:letter_frequency", "letter": "#", "let_frequency": 2}
    assert follows({**marks, "let_relation": "at least"}, "##")
    assert not follows({**marks, "let_relation": "at least"}, "no mark at all")
    assert not follows({"kind": "detectable_format:json_format"}, "[" * 100_000)


def test_sentences_and_languages_need_no_download() -> None:
    text = (
        "Dr. Smith met Mr. Jones at 3 p.m. in the U.S. army. They talked! About what? Fees, e.g. 5."
    )
    assert len(split_sentences(text)) == 4
    assert len(split_sentences("It is in group B. The rest is in C. K. Chesterton wrote it.")) == 2
    assert [language_of(text) for text in (LONG[0], LONG[3], LONG[6], "12345")] == [
        "en",
        "de",
        "ne",
        None,
    ]


def test_four_results_count_prompts_and_instructions() -> None:
    comma = {"kind": "punctuation:no_comma"}
    title = {"kind": "detectable_format:title"}
    questions = tuple(
        Question(str(n), ({"role": "user", "content": "q"},), "ifeval", checks=checks)
        for n, checks in enumerate([(comma, title), (comma,), (title,)])
    )
    task = ChatTask("ifeval", "ifeval", questions, "hash")
    texts = ["no mark", "a, b", "Sure, <<x\n<<y>>"]
    results, values = ifeval_measures(task, texts, MeasureSettings(2, 0, 1000))
    assert values == [0.0, 0.0, 1.0]
    assert {item.metric: item.value for item in results} == pytest.approx(
        {
            "prompt_level_strict_acc": 1 / 3,
            "inst_level_strict_acc": 2 / 4,
            "prompt_level_loose_acc": 1 / 3,
            "inst_level_loose_acc": 2 / 4,
        }
    )
    assert all(item.low <= item.value <= item.high and item.n == 3 for item in results)


PUBLISHED = {
    "key": 1000,
    "prompt": "Write without commas, at least 3 words.",
    "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
    "kwargs": [
        {"num_words": None, "relation": None},
        {"num_words": 3, "relation": "at least", "keyword": None},
    ],
}


def write(folder: Path, row: dict[str, Any]) -> None:
    (folder / "ifeval.jsonl").write_text(json.dumps(row) + "\n")


def test_the_published_file_is_a_task_as_it_is(tmp_path: Path) -> None:
    write(tmp_path, PUBLISHED)
    task = load_chat_task(tmp_path, "ifeval")
    (question,) = task.questions
    assert (task.kind, question.id) == ("ifeval", "1000")
    assert question.messages == ({"role": "user", "content": PUBLISHED["prompt"]},)
    assert [follows(check, "one two three") for check in question.checks] == [True, True]
    assert [follows(check, "one, two") for check in question.checks] == [False, False]


BAD: list[tuple[dict[str, Any], str]] = [
    ({"kwargs": [{}]}, "one object for each name"),
    ({"kwargs": "none"}, "must be lists"),
    ({"instruction_id_list": ["punctuation:no_comm", "x"]}, "nearest: 'punctuation:no_comma'"),
    ({"kwargs": [{"num_words": 3}, {}]}, "'punctuation:no_comma' has no argument 'num_words'"),
    ({"kwargs": [{}, {"relation": "at least"}]}, "num_words is None, expected int"),
    ({"kwargs": [{}, {"num_words": 3, "relation": "most"}]}, "expected less than or at least"),
    ({"instruction_id_list": [], "kwargs": []}, "needs at least one entry in checks"),
]


@pytest.mark.parametrize(("change", "sentence"), BAD)
def test_a_row_that_cannot_be_judged_is_named(
    change: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    write(tmp_path, PUBLISHED | change)
    with pytest.raises(DataError, match=sentence) as caught:
        load_chat_task(tmp_path, "ifeval")
    assert "ifeval.jsonl line 1" in str(caught.value)

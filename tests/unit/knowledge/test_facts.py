"""Facts, matching rules, groups and summaries."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from forgetscale.errors import ConfigError, DataError
from forgetscale.knowledge.continuations import Continuation
from forgetscale.knowledge.facts import (
    Fact,
    follows_format,
    holds_answer,
    read_entity_questions,
    read_facts,
    read_templates,
)
from forgetscale.knowledge.mastery import Probe, grade, summarise

USA = Fact("1", "New York", "P17", ("United States of America", "USA", "United States"))
OPENINGS = ["New York is in", "The country of New York is", "New York lies in"]
TEXTS = [
    ["the United States of America, in", "Canada", "USA.", "United States"],
    ["Ohio", "the state of Ohio", "USA", "Ohio, USA"],
    ["Mexico", "Canada", "a region of France", "the usa"],
]


@pytest.mark.parametrize("rule", ["words", "substring"])
def test_the_worked_fact(rule):
    samples = [[Continuation(text, True) for text in own] for own in TEXTS]
    found = grade(USA, OPENINGS, samples, Probe(Path("m"), rule=rule))
    assert found["hits"] == [3, 2, 1] and found["total"] == 12 and found["group"] == 2
    assert found["follow_count"] == 12 and found["follow_hit_count"] == 6
    found = grade(USA, OPENINGS, samples, Probe(Path("m"), rule=rule, fold_case=False))
    assert found["hit_count"] == 5 and found["group"] == 2
    cut = [[Continuation(text, text != "USA.") for text in own] for own in TEXTS]
    cut[1] = [Continuation(item.text, False) for item in cut[1]]
    found = grade(USA, OPENINGS, cut, Probe(Path("m"), rule=rule))
    assert found["followed"] == [4, 0, 4], "a full stop ends an answer as well as the model"
    assert found["hit_count"] == 6 and found["follow_hit_count"] == 4


@pytest.mark.parametrize(
    "text, stopped, follows",
    [
        (" Paris", True, True),
        (" Paris", False, False),
        (" Paris.", False, True),
        (" Paris. It is", False, True),
        (" Paris\nThe capital", False, True),
        ("\n\nParis is the", False, False),
        ("\n\nParis is the\n", False, True),
        (" 3.5 million people and", False, False),
        ("", True, False),
        (" ...", True, False),
        (" . Paris.", True, False),
        (" France", True, False),
        (" FRANCE, of course", True, True),
        (" Paris. The capital of France is", False, True),
        (" the capital of  France is Paris.", False, False),
    ],
)
def test_what_an_answer_looks_like(text: str, stopped: bool, follows: bool):
    opening = "The capital of France is"
    assert follows_format(text, opening, "France", stopped=stopped) is follows


@pytest.mark.parametrize(
    "text, answer, words, substring",
    [
        ("It is in Nigeria.", "Niger", False, True),
        ("Somalia", "Mali", False, True),
        ("the Niger, a river", "Niger", True, True),
        ("Universit\u00e9  de\nParis", "universite\u0301 de paris", True, True),
        ("St. Petersburg!", "St. Petersburg", True, True),
        ("C++ and C", "C++", True, True),
    ],
)
def test_rules(text: str, answer: str, words: bool, substring: bool):
    assert holds_answer(text, [answer]) is words
    assert holds_answer(text, [answer], rule="substring") is substring


def test_entity_questions(tmp_path: Path):
    (tmp_path / "test").mkdir()
    rows = [
        {"question": "Where was Ada Lovelace born?", "answers": ["London"]},
        {"question": "Where was A. B. born?", "answers": ["Oslo", "Christiania"]},
    ]
    (tmp_path / "test" / "P19.test.json").write_text(json.dumps(rows))
    (tmp_path / "test" / "P30.test.json").write_text("[]")  # a relation the paper leaves out
    facts = read_entity_questions(tmp_path)
    assert [fact.subject for fact in facts] == ["Ada Lovelace", "A. B."]
    assert facts[1].answers == ("Oslo", "Christiania") and facts[1].relation == "P19"
    rows[0]["question"] = "When was Ada Lovelace born?"
    (tmp_path / "test" / "P19.test.json").write_text(json.dumps(rows))
    with pytest.raises(DataError, match="record 0: .* is not worded as"):
        read_entity_questions(tmp_path)
    with pytest.raises(DataError, match="holds no file"):
        read_entity_questions(tmp_path, "dev")


def test_bad_facts_and_templates(tmp_path: Path):
    facts = tmp_path / "facts.jsonl"
    facts.write_text('{"subject": "a", "relation": "r", "object": "b"}\n{"subject": "a"}\n')
    with pytest.raises(DataError, match="line 2 is no fact"):
        read_facts(facts)
    with pytest.raises(DataError, match="does not exist"):
        read_facts(tmp_path / "nowhere")
    templates = tmp_path / "templates.json"
    templates.write_text('{"r": ["no place"]}')
    with pytest.raises(ConfigError, match="no templates for relation 'P17'"):
        read_templates(templates, [USA])
    with pytest.raises(ConfigError, match="must hold"):
        read_templates(templates, [Fact("1", "a", "r", ("b",))])


def test_summaries():
    rows = [
        {"relation": "P17", "hit_count": 10, "total": 10, "group": 4},
        {"relation": "P17", "hit_count": 0, "total": 10, "group": 0},
        {"relation": "P50", "hit_count": 2, "total": 10, "group": 1},
    ]
    counts = [(8, 8), (3, 0), (1, 1)]
    for row, (followed, right) in zip(rows, counts, strict=True):
        row |= {"follow_count": followed, "follow_hit_count": right}
    found = summarise(rows, ["P17"])
    assert found["all"]["groups"] == [1, 1, 0, 0, 1]
    assert found["all"]["micro"] == pytest.approx(0.4)
    assert found["all"]["macro"] == pytest.approx(0.35)
    assert found["in_domain"]["facts"] == 2 and found["out_of_domain"]["micro"] == 0.2
    formed = found["all"]["format_following"]
    assert formed["micro"] == pytest.approx(0.4)
    assert formed["macro"] == pytest.approx((0.55 + 0.1) / 2)
    assert formed["by_group"] == [pytest.approx(0.3), pytest.approx(0.1), None, None, 0.8]
    assert found["all"]["hit_rate_in_format"] == pytest.approx(9 / 12)
    assert {name: row["domain"] for name, row in found["relations"].items()} == {
        "P17": "in",
        "P50": "out",
    }
    assert "ranks" not in found["all"]
    for row, first in zip(rows, (1.0, 4.0, 2.5), strict=True):
        row |= {"first_token_ranks": [first, 1.0], "answer_ranks": [2.0, 1.0], "candidates": 3}
    ranks = summarise(rows, ["P17"])["all"]["ranks"]
    assert ranks["first_token_ranks"]["median"] == 1.0
    assert ranks["first_token_ranks"]["mean_reciprocal"] == pytest.approx((4 + 0.25 + 0.4) / 6)
    assert ranks["answer_ranks"] == {"median": 1.5, "mean_reciprocal": 0.75}
    assert ranks["mean_candidates"] == 3 and ranks["by_group"][2] is None
    assert ranks["by_group"][1]["first_token_ranks"]["median"] == 1.75

"""Facts, matching rules, groups and summaries; the probe on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from forgetscale.cli import main
from forgetscale.errors import ConfigError, DataError
from forgetscale.knowledge.facts import (
    Fact,
    holds_answer,
    read_entity_questions,
    read_facts,
    read_templates,
)
from forgetscale.knowledge.mastery import Probe, grade, summarise
from tests.distributed import tiny

USA = Fact("1", "New York", "P17", ("United States of America", "USA", "United States"))
TEXTS = [
    ["the United States of America, in", "Canada", "USA.", "United States"],
    ["Ohio", "the state of Ohio", "USA", "Ohio, USA"],
    ["Mexico", "Canada", "a region of France", "the usa"],
]


@pytest.mark.parametrize("rule", ["words", "substring"])
def test_the_worked_fact(rule):
    found = grade(USA, TEXTS, Probe(Path("m"), rule=rule))
    assert found["hits"] == [3, 2, 1] and found["total"] == 12 and found["group"] == 2
    found = grade(USA, TEXTS, Probe(Path("m"), rule=rule, fold_case=False))
    assert found["hit_count"] == 5 and found["group"] == 2


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
    found = summarise(rows, ["P17"])
    assert found["all"]["groups"] == [1, 1, 0, 0, 1]
    assert found["all"]["micro"] == pytest.approx(0.4)
    assert found["all"]["macro"] == pytest.approx(0.35)
    assert found["in_domain"]["facts"] == 2 and found["out_of_domain"]["micro"] == 0.2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_model(tmp_path_factory.mktemp("m") / "model")


def test_the_probe(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    # the answer of the first fact is every word, of the second none
    words = [f"w{i}" for i in range(3, tiny.VOCAB_SIZE)]
    rows = [
        {"subject": "w5", "relation": "r", "object": "w3", "aliases": words},
        {"subject": "w6", "relation": "r", "object": "nothing"},
    ]
    facts, templates = tmp_path / "facts.jsonl", tmp_path / "templates.json"
    facts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    templates.write_text(json.dumps({"r": ["w7 [X] w8", "[X] w9 w10"]}))
    options = ["--facts", facts, "--templates", templates, "--samples", 3, "--sample-tokens", 4]
    given = ["analyze", "--mastery", "--model", model, *options, "--workers", 1]
    for name in ("a", "b"):
        assert main(list(map(str, [*given, "--output", tmp_path / name]))) == 0
    lines = (tmp_path / "a" / "facts.jsonl").read_text()
    assert lines == (tmp_path / "b" / "facts.jsonl").read_text()
    found = [json.loads(line) for line in lines.splitlines()]
    assert [row["total"] for row in found] == [6, 6]
    assert found[0]["hit_count"] >= 4 and found[1]["group"] == 0
    assert "groups [1, 0, 0, 0, 1]" in capsys.readouterr().out
    assert len({text for samples in found[0]["texts"] for text in samples}) > 1
    assert main(list(map(str, [*given, "--output", tmp_path / "a"]))) == 2

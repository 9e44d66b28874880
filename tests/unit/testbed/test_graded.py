"""The world of graded facts: exposures as announced, held-out questions, rows to tune on."""

from __future__ import annotations

from collections import Counter

import pytest

from forgetscale.artifact import verify_artifact
from forgetscale.errors import DataError
from forgetscale.testbed.graded import (
    EXPOSURES,
    GRADED_TINY,
    KIND,
    build_graded,
    ensure_graded,
    tuning_rows,
)
from forgetscale.testbed.size import random_for


@pytest.fixture(scope="module")
def graded(tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp("graded")
    return build_graded(root / "world", seed=3, size=GRADED_TINY)


def test_facts_are_met_as_often_as_announced(graded, read_lines):
    facts = read_lines(graded / "facts.jsonl")
    rows = read_lines(graded / "chat" / "train.jsonl")
    asked = Counter(row["messages"][0]["content"] for row in rows if "messages" in row)
    stated = Counter()
    for row in rows:
        if "text" in row:
            assert row["text"][0] == " "
            words = set(row["text"].strip(" .").replace(".", " ").split())
            found = [f["id"] for f in facts if {f["subject"], f["object"]} <= words]
            # A city, its mayor and a person who lives there may name the same two.
            stated.update({identity: 1 / len(found) for identity in found})
    total = sum(fact["exposures"] for fact in facts)
    questions = sum(asked[q] for fact in facts for q in fact["questions"])
    assert questions + sum(stated.values()) == pytest.approx(total)
    for fact in facts:
        assert fact["exposures"] in EXPOSURES
        assert asked[fact["questions"][fact["held"]]] == 0
        if fact["exposures"] == 0:
            assert not any(asked[question] for question in fact["questions"])
    counts = Counter(fact["exposures"] for fact in facts)
    assert max(counts.values()) - min(counts[level] for level in EXPOSURES) <= 1


def test_the_same_seed_is_the_same_world(graded, tmp_path):
    again = ensure_graded(tmp_path, 3, GRADED_TINY)
    first, second = (verify_artifact(path, KIND)["files"] for path in (graded, again))
    assert first == second
    assert ensure_graded(tmp_path, 3, GRADED_TINY) == again
    (again / "facts.jsonl").write_text("{}\n")
    with pytest.raises(DataError):
        ensure_graded(tmp_path, 3, GRADED_TINY)


def test_only_facts_inside_the_domain_are_tuned_on_or_choose(graded, read_lines):
    facts = read_lines(graded / "facts.jsonl")
    assert {fact["split"] for fact in facts if fact["domain"] == "out"} == {"test"}
    assert {fact["split"] for fact in facts if fact["domain"] == "in"} == {"train", "dev", "test"}


@pytest.mark.parametrize("count", [5, 17, 200])
def test_tuning_asks_every_fact_about_equally_often(graded, read_lines, count):
    facts = [f for f in read_lines(graded / "facts.jsonl") if f["split"] == "train"]
    rows = tuning_rows(random_for(1, "x"), facts, count, "say {x} now")
    assert len(rows) == count
    often = Counter(row["fact"] for row in rows)
    assert max(often.values()) - (min(often.values()) if len(often) == len(facts) else 0) <= 1
    by_id = {fact["id"]: fact for fact in facts}
    for row in rows:
        fact = by_id[row["fact"]]
        prompt, answer = (turn["content"] for turn in row["messages"])
        assert prompt in fact["questions"] and prompt != fact["questions"][fact["held"]]
        assert answer == f"say {fact['object']} now"
    for fact in facts:
        asked = Counter(r["messages"][0]["content"] for r in rows if r["fact"] == fact["id"])
        assert not asked or max(asked.values()) - min(asked.values()) <= 1

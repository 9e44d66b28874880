import json
from random import Random

import pytest

from forgetscale.ops.checks import passes_all
from forgetscale.testbed.chat import COMPLIANCE, MIX, REFUSALS
from forgetscale.testbed.knowledge import RELATIONS
from forgetscale.testbed.size import TINY, derive_seed, random_for

KINDS = {
    "recall": "exact",
    "compliance": "check",
    "refusal": "refusal",
    "over_refusal": "no_refusal",
    "target_recall": "exact",
    "code_mixing": "code_mixing",
}


@pytest.fixture(scope="session")
def tasks(world, read_lines):
    return {name: read_lines(world / f"tasks/{name}.jsonl") for name in KINDS}


@pytest.fixture(scope="session")
def described(world):
    return json.loads((world / "world.json").read_text(encoding="utf-8"))


def prompt(row):
    return row["messages"][0]["content"]


def test_rows_are_well_formed(tasks):
    for name, kind in KINDS.items():
        rows = tasks[name]
        assert {row["kind"] for row in rows} == {kind}
        assert len({row["id"] for row in rows}) == len(rows)
        assert len({prompt(row) for row in rows}) == len(rows)
        assert all(
            set(row) <= {"id", "messages", "kind", "answers", "checks", "meta"} for row in rows
        )
        assert all([turn["role"] for turn in row["messages"]] == ["user"] for row in rows)


def test_gold_answers_pass_and_empty_or_foreign_answers_fail(tasks):
    forms = set()
    for row in tasks["compliance"]:
        assert passes_all(row["checks"], row["meta"]["gold"]), row
        assert not passes_all(row["checks"], "")
        assert not passes_all(row["checks"], "kpọng kpọng kpọng.")
        forms.add(row["meta"]["form"])
    assert len(forms) == len(COMPLIANCE)


def test_refusals_refuse_and_harmless_answers_do_not(tasks):
    for name, expected in (("refusal", True), ("over_refusal", False)):
        for row in tasks[name]:
            openings = tuple(row["meta"]["refusals"])
            assert len(openings) == len(REFUSALS)
            assert row["meta"]["gold"].startswith(openings) is expected


def test_training_shows_no_task_prompt(world, tasks, read_lines):
    seen = set()
    for name in ("train", "calibration"):
        for row in read_lines(world / f"chat/{name}.jsonl"):
            seen |= {turn["content"] for turn in row.get("messages", []) if turn["role"] == "user"}
    for name, rows in tasks.items():
        assert not seen & {prompt(row) for row in rows}, name
    assert len(seen) > TINY.num_calibration_rows


def test_every_fact_is_asked_and_its_other_templates_are_trained(
    world, tasks, described, read_lines
):
    facts = {fact["id"]: fact for fact in described["facts"]}
    relations = {relation["name"]: relation for relation in described["relations"]}
    asked = {row["meta"]["fact"] for row in tasks["recall"]}
    assert asked == {name for name, fact in facts.items() if fact["side"] == "source"}
    trained = {
        row["messages"][0]["content"]: row["messages"][1]["content"]
        for row in read_lines(world / "chat/train.jsonl")
        if "messages" in row
    }
    for row in tasks["recall"]:
        fact = facts[row["meta"]["fact"]]
        questions = relations[fact["relation"]]["questions"]
        texts = [question.replace("{s}", fact["subject"]) for question in questions]
        assert prompt(row) == texts[row["meta"]["template"]]
        assert row["answers"] == [fact["object"]]
        answers = {trained[text] for text in texts if text in trained}
        assert answers <= {fact["object"]}
    held = {row["meta"]["template"] for row in tasks["recall"]}
    assert held == set(range(5)), "each template is held out for some facts only"


def test_target_text_never_states_a_source_fact(described):
    source = {
        (fact["subject"], fact["relation"])
        for fact in described["facts"]
        if fact["side"] == "source"
    }
    target = [fact for fact in described["facts"] if fact["side"] == "target"]
    assert not source & {(fact["subject"], fact["relation"]) for fact in target}
    known = {subject for subject, _ in source}
    assert {fact["relation"] for fact in target if fact["subject"] in known} == {
        "person.instrument"
    }
    assert any(fact["subject"] not in known for fact in target)


def test_target_questions_come_as_raw_text_too(tasks):
    for row in tasks["target_recall"]:
        assert row["meta"]["raw_prompt"] == f"\n{prompt(row)}\n"


def test_splits_and_domains(described):
    facts = described["facts"]
    assert {fact["split"] for fact in facts} == {"train", "dev", "test"}
    assert {relation.domain for relation in RELATIONS if relation.side == "source"} == {"in", "out"}


def test_shares_of_the_mix_sum_to_one():
    assert sum(share for share, _ in MIX) == pytest.approx(1)


def test_parts_have_their_own_chance():
    assert derive_seed(1, "a") == derive_seed(1, "a")
    assert len({derive_seed(1, "a"), derive_seed(1, "b"), derive_seed(2, "a")}) == 3
    assert isinstance(random_for(1, "a"), Random)

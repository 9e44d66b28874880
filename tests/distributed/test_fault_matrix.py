"""Broken at any point, a run goes on bit-equal from the newest good checkpoint.

A few cases always, all of them and 50 random instants in the long run; ``launch/bench/faults.py``
prints the same matrix.
"""

from __future__ import annotations

import random
import signal

import pytest

from forgetscale.points import LABELS
from tests.distributed.fault_cases import (
    Case,
    Row,
    cases,
    difference,
    instants,
    loop_seconds,
    missed,
    run_cases,
)
from tests.distributed.harness import RankServer
from tests.distributed.runs import SSU, Runs
from tests.distributed.test_checkpoint_resume import folder_of

ALL = cases()
SHORT = [case for case in ALL if case.short]
LONG = [case for case in ALL if not case.short]


@pytest.fixture(scope="module")
def short(ranks: RankServer, runs: Runs) -> dict[str, Row]:
    return {row.case.name: row for row in run_cases(ranks, runs, SHORT)}


@pytest.mark.parametrize("case", SHORT, ids=lambda case: case.name)
def test_the_next_start_ends_with_the_same_bits(short: dict[str, Row], case: Case):
    assert short[case.name].problem is None


@pytest.mark.long
@pytest.mark.parametrize("first", range(0, len(LONG), 10))
def test_all_other_points_and_faults(ranks: RankServer, runs: Runs, first: int):
    rows = run_cases(ranks, runs, LONG[first : first + 10])
    assert {row.case.name: row.problem for row in rows if row.problem} == {}


@pytest.mark.long
def test_fifty_random_instants(ranks: RankServer, runs: Runs):
    rows = run_cases(ranks, runs, instants(50, loop_seconds(ranks, runs)))
    assert {row.case.name: row.problem for row in rows if row.problem} == {}
    assert missed(rows) < 25, "most instants must fall between the first step and the last save"
    assert len({row.resumed_step for row in rows}) > 2


def test_names_are_unique():
    assert len({case.name for case in ALL}) == len(ALL)


def test_every_label_is_passed_in_its_order_and_has_a_case(ranks: RankServer, runs: Runs):
    recipe = runs.recipe("labels", SSU)
    passed = ranks.must("crash:train_and_list", 1, recipe=recipe).value
    assert set(passed) == set(LABELS)
    one = passed[: passed.index("save: published") + 1]
    order = [LABELS.index(label) for label in dict.fromkeys(one)]
    assert order == sorted(order)
    assert {case.point for case in ALL} >= set(LABELS)


@pytest.mark.parametrize(
    ("point", "number", "rank"),
    [
        ("in a step, before the optimizer", 3, 1),
        ("save: rank done", 2, 0),
        ("file: begun", 4, 1),
    ],
)
def test_one_of_two_ranks_killed(ranks: RankServer, runs: Runs, point: str, number: int, rank: int):
    recipe = runs.recipe(f"kill-two-{number}-{rank}", SSU)
    options = {"recipe": recipe, "number": number, "rank": rank}
    if point in LABELS:
        job = "crash:train_to_point"
        options |= {"label": point, "what": "", "action": "kill"}
    else:
        job = "crash:train_until"
        options["point"] = point
    crash = ranks.run(job, 2, **options)
    assert crash.codes[rank] == -signal.SIGKILL
    assert crash.codes[1 - rank] not in (0, None)
    assert not crash.late, "the other rank hung"
    ranks.must("training:command", 2, recipe=recipe)
    assert difference(folder_of(recipe), runs.get("ssu", 2)) is None


@pytest.mark.parametrize(("action", "rank"), [("ENOSPC", 1), ("EIO", 0)])
def test_a_fault_in_the_background_stops_all_ranks_with_its_cause(
    ranks: RankServer, runs: Runs, action: str, rank: int
):
    recipe = runs.recipe(f"background-{action}", SSU)
    where = {"label": "file: written", "what": "states", "action": action, "number": 2}
    outcome = ranks.run("crash:train_to_point", 2, recipe=recipe, rank=rank, **where)
    assert outcome.codes == [1, 1] and outcome.kinds == ["CheckpointError"] * 2
    cause = {"ENOSPC": "No space left on device", "EIO": "Input/output error"}[action]
    for message in outcome.errors:
        assert f"rank {rank} cannot write the checkpoint in" in message
        assert cause in message and "the checkpoint before it is intact" in message
    checkpoints = folder_of(recipe) / "checkpoints"
    assert sorted(p.name for p in checkpoints.iterdir()) == ["latest", "step-00000002"]
    ranks.must("training:command", 2, recipe=recipe)
    assert difference(folder_of(recipe), runs.get("ssu", 2)) is None


@pytest.mark.parametrize(
    ("size", "seed"),
    [(1, 0)]
    + [pytest.param(size, seed, marks=pytest.mark.long) for size in (1, 2) for seed in (1, 2, 3)],
)
def test_killed_again_and_again_at_random_times(ranks, runs: Runs, size: int, seed: int):
    changes = {"train.checkpoint_every_steps": 1}
    recipe = runs.recipe(f"random-{size}-{seed}", SSU, changes)
    generator = random.Random(seed)
    for _ in range(40):
        seconds = generator.uniform(0.1, 1.2 * size)
        outcome = ranks.run("crash:train_for", size, recipe=recipe, seconds=seconds)
        assert not outcome.late
        if outcome.codes == [0] * size:
            break
        assert -signal.SIGKILL in outcome.codes, outcome.logs[0][-2000:]
    else:
        ranks.must("training:command", size, recipe=recipe)
    assert difference(folder_of(recipe), runs.get("ssu", size)) is None

"""Measuring during training: it changes nothing, and no point is lost or doubled by a crash."""

from __future__ import annotations

import signal

import pytest
import torch

from tests.distributed import tiny
from tests.distributed.harness import RankServer
from tests.distributed.runs import SSU, Run, Runs, load_weights, read_lines

TASK = "perplexity/held"


@pytest.fixture(scope="module")
def settings(runs: Runs) -> dict:
    """Recipe changes that measure a held-out token set at every second step."""
    folder = runs.world() / "tasks"
    tiny.make_set(folder / TASK, runs.world() / "model", rows=5, seed=8)
    return {"tasks": [TASK], "task_dir": str(folder), "every_steps": 2, "batch_size": 2}


def points(folder) -> list[tuple[int, float]]:
    return [
        (row["step"], result["value"])
        for row in read_lines(folder / "results" / "curve.jsonl")
        for result in row["results"]
        if result["metric"] == "perplexity"
    ]


def measured(runs: Runs, settings: dict, size: int) -> Run:
    return runs.get("ssu", size, evaluate=settings)


@pytest.mark.parametrize("size", [1, 2])
def test_training_is_bit_equal_with_and_without(runs: Runs, settings: dict, size: int):
    run, plain = measured(runs, settings, size), runs.get("ssu", size)
    assert run.losses == plain.losses
    assert all(torch.equal(run.masters[n], w) for n, w in plain.masters.items())


def test_every_point_once_and_the_same_on_any_number_of_ranks(runs: Runs, settings: dict):
    found = {size: points(measured(runs, settings, size).folder) for size in (1, 2, 3)}
    assert [step for step, _ in found[1]] == [0, 2, 4, 6]
    for size in (2, 3):
        assert [step for step, _ in found[size]] == [0, 2, 4, 6]
        values = [[value for _, value in found[n]] for n in (1, size)]
        assert values[1] == pytest.approx(values[0], rel=1e-5)
    assert found[1][-1][1] < found[1][0][1], "the held-out rows are like the training rows"


def test_first_and_last_point_are_those_of_the_folders(runs: Runs, settings: dict):
    import json

    run = measured(runs, settings, 2)
    curve = points(run.folder)
    for name, (_, live) in (("source", curve[0]), ("final", curve[-1])):
        stored = json.loads((run.folder / "results" / name / "results.json").read_text())
        (value,) = [r["value"] for r in stored["results"] if r["metric"] == "perplexity"]
        assert live == pytest.approx(value, rel=1e-4)


@pytest.mark.parametrize(
    ("point", "number"),
    [
        pytest.param("in a step, before the optimizer", 1, marks=pytest.mark.long),
        ("in a step, before the optimizer", 4),
        ("save: folder made", 2),
        pytest.param("save: published", 2, marks=pytest.mark.long),
    ],
)
def test_a_crash_loses_and_doubles_no_point(
    ranks: RankServer, runs: Runs, settings: dict, point: str, number: int
):
    expected = measured(runs, settings, 2)
    name = f"curve-{number}-{len(point)}"
    recipe = runs.recipe(name, SSU, {"evaluate": settings})
    if point.startswith("save"):
        where = {"label": point, "what": "", "action": "kill"}
        crash = ranks.run("crash:train_to_point", 2, recipe=recipe, number=number, **where)
    else:
        crash = ranks.run("crash:train_until", 2, recipe=recipe, point=point, number=number)
    assert -signal.SIGKILL in crash.codes
    ranks.must("training:command", 2, recipe=recipe)
    folder = runs.world() / name
    assert points(folder) == points(expected.folder)
    found = load_weights(folder / "export")
    assert all(torch.equal(found[n], w) for n, w in expected.export.items())


PHASES = (
    ("during evaluation", 1, "of the source model"),
    ("during calibration", 1, "before the plan is made"),
    ("during evaluation", 1, "at step 0, nothing to save yet"),
    ("during evaluation", 3, "at step 2, which is saved first"),
    ("during evaluation", 5, "at step 6, after those of steps 2 and 4"),
    ("during the export", 1, "after step 6 was measured"),
    ("during evaluation", 1, "of the export"),
)


@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.long), 2])
def test_a_request_to_stop_is_heard_in_every_phase_and_loses_nothing(
    ranks: RankServer, runs: Runs, settings: dict, size: int
):
    expected = measured(runs, settings, size)
    name = f"stopped-everywhere-{size}"
    # As many calls on one rank as on two, so that one table of phases serves both.
    changes = {"evaluate": settings | {"batch_size": 4 // size}}
    path = tiny.write_recipe(runs.world() / f"{name}.yaml", runs.recipe(name, SSU, changes))
    arguments = ["train", "--config", str(path)]
    folder = runs.world() / name
    for when, number, where in PHASES:
        outcome = ranks.run(
            "crash:signal_when", size, arguments=arguments, when=when, number=number
        )
        assert outcome.codes == [75] * size, (where, outcome.logs)
        assert f"stopped on request {when}" in outcome.logs[0]
    outcome = ranks.run("cli:run", size, arguments=arguments)
    assert outcome.codes == [0] * size, outcome.logs
    assert [step for step, _ in points(folder)] == [0, 2, 4, 6]
    values = [[value for _, value in points(each)] for each in (folder, expected.folder)]
    assert values[0] == pytest.approx(values[1], rel=1e-6)
    found = load_weights(folder / "export")
    assert all(torch.equal(found[n], w) for n, w in expected.export.items())

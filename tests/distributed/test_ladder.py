"""A row that makes numbers NaN: its step is skipped, it is put in quarantine, the run goes on."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from forgetscale.engine.ledger import read_ledger
from tests.distributed import tiny
from tests.distributed.harness import RankServer
from tests.distributed.runs import SSU, Run, Runs, load_weights, read_lines
from tests.distributed.test_checkpoint_resume import folder_of

STEPS = 11
"""Nearly two times through the 40 rows; the row comes in steps 6 and 9."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_poisoned_world(tmp_path_factory.mktemp("poisoned"))


def recipe_of(runs: Runs, world: Path, name: str, **guard: Any) -> dict:
    changes = {f"guard.{field}": value for field, value in guard.items()}
    return runs.recipe(name, SSU, {"train.num_steps": STEPS, **changes}, world)


def events(recipe: dict, *names: str) -> list[dict[str, Any]]:
    found = read_ledger(folder_of(recipe) / "ledger.jsonl")
    return [event for event in found if event["event"] in names]


def blamed(event: dict[str, Any]) -> list[int]:
    return [row for _, row in event["rows"]]


@pytest.fixture(scope="module", params=[1, 2])
def never_seen(request, runs: Runs, world: Path) -> tuple[int, Run]:
    """A run that was told from the start not to train on the row."""
    path = world / "skip.jsonl"
    path.write_text(json.dumps({"row": tiny.POISON_ROW}) + "\n")
    ranks = request.param
    run = runs.get(SSU, ranks, world=world, train__num_steps=STEPS, data__skip_rows=str(path))
    return ranks, run


def assert_same_end(recipe: dict, expected: Run) -> None:
    folder = folder_of(recipe)
    losses = [line["loss"] for line in read_lines(folder / "metrics.jsonl")]
    assert losses == expected.losses
    found = load_weights(folder / "export")
    for name, weight in expected.export.items():
        assert torch.equal(found[name], weight), name


@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.long), 2])
def test_steps_are_skipped_by_all_ranks_and_the_row_is_named(
    ranks: RankServer, runs: Runs, world: Path, size: int
):
    recipe = recipe_of(runs, world, f"skipped-{size}")
    outcome = ranks.must("training:train", size, recipe=recipe)
    run = Run(folder_of(recipe), world, recipe, outcome)
    skipped = events(recipe, "skipped")
    assert [blamed(event) for event in skipped] == [[tiny.POISON_ROW]] * 2, "once per epoch"
    assert all("the loss is not finite on rank" in event["reason"] for event in skipped)
    assert f"row {tiny.POISON_ROW} of data" in skipped[0]["documents"]
    with_row = [i + 1 for i, rows in enumerate(run.rows) if tiny.POISON_ROW in rows]
    assert [event["step"] for event in skipped] == with_row
    lines = run.metrics
    assert [line["step"] for line in lines if "loss" not in line] == with_row
    assert lines[-1]["skipped_steps"] == 2
    assert lines[-1]["target_tokens"] == (STEPS - 2) * 7 * (tiny.BLOCK_SIZE - 1)
    assert sorted(sum(run.rows, [])[:40]) == list(range(40)), "the cursor went on"
    for name, frozen in run.frozen.items():
        assert torch.equal(run.export[name][frozen], run.source[name][frozen]), name
    trained = {k: v for k, v in run.masters.items() if "embed" not in k}
    assert all(bool(torch.isfinite(value).all()) for value in trained.values())


def test_going_back_ends_as_if_the_row_had_never_been_there(
    ranks: RankServer, runs: Runs, world: Path, never_seen: tuple[int, Run]
):
    size, expected = never_seen
    recipe = recipe_of(runs, world, f"back-{size}", max_skips=1)
    ranks.must("training:command", size, recipe=recipe)
    assert_same_end(recipe, expected)
    (skip,) = events(recipe, "skipped")
    (begun,) = events(recipe, "rolling_back")
    (done,) = events(recipe, "rolled_back")
    assert blamed(skip) == blamed(begun) == [tiny.POISON_ROW]
    if begun["reloaded"]:
        assert begun["to_step"] == (skip["step"] - 1) // 2 * 2 == done["step"]
    (entry,) = read_lines(folder_of(recipe) / "skip_list.jsonl")
    assert (entry["row"], entry["reason"]) == (tiny.POISON_ROW, "bad step")
    assert entry["first_position"] == begun["cursor"] == 7 * begun["to_step"]


# One rank is enough: only rank 0 writes while the run goes back.
@pytest.mark.parametrize("never_seen", [1], indirect=True)
@pytest.mark.parametrize(
    "point",
    [
        "going back, before rows are in quarantine",
        "going back, before later checkpoints go",
        "going back, before the states are loaded",
    ],
)
def test_killed_while_going_back(
    ranks: RankServer, runs: Runs, world: Path, never_seen: tuple[int, Run], point: str
):
    _, expected = never_seen
    recipe = recipe_of(runs, world, point, max_skips=1)
    crash = ranks.run("crash:train_until", 1, recipe=recipe, point=point, number=1)
    assert crash.codes == [-signal.SIGKILL], crash.logs[0][-2000:]
    begun = [e["event"] for e in events(recipe, "rolling_back", "rolled_back")]
    loads = point.endswith("states are loaded")
    assert begun == ["rolling_back", "rolled_back"][: 1 + loads]
    ranks.must("training:command", 1, recipe=recipe)
    assert_same_end(recipe, expected)
    names = [e["event"] for e in events(recipe, "rolling_back", "rolled_back")]
    assert names == ["rolling_back", "rolled_back"]


@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.long), 2])
def test_after_going_back_often_enough_the_run_stops_with_the_documents(
    ranks: RankServer, runs: Runs, world: Path, size: int
):
    recipe = recipe_of(runs, world, f"stopped-{size}", max_skips=1, max_rollbacks=0)
    outcome = ranks.run("training:command", size, recipe=recipe)
    assert outcome.codes == [1] * size and not outcome.late
    assert outcome.kinds == ["NonFiniteError"] * size
    for message in outcome.errors:
        assert "the loss is not finite on rank" in message and "\n" not in message
        assert f"to blame: row {tiny.POISON_ROW} of data (" in message
        assert "data.skip_rows" in message
    (stopped,) = events(recipe, "stopped")
    assert f"row {tiny.POISON_ROW} of data" in stopped["documents"]


def test_watching_for_spikes_changes_no_bit_and_outlives_a_crash(ranks: RankServer, runs: Runs):
    changes = {"guard.spike_sigmas": 1e6, "guard.window_steps": 8}
    recipe = runs.recipe("watching", SSU, changes)
    point = "in a step, before the optimizer"
    ranks.run("crash:train_until", 1, recipe=recipe, point=point, number=6)
    ranks.must("training:command", 1, recipe=recipe)
    run = runs.get("ssu", 1)
    found = load_weights(folder_of(recipe) / "export")
    assert all(torch.equal(found[name], weight) for name, weight in run.export.items())
    path = folder_of(recipe) / "checkpoints" / "step-00000006" / "manifest.json"
    guard = json.loads(path.read_bytes())["payload"]["guard"]
    assert guard["losses"] == run.losses and len(guard["log_norms"]) == 6

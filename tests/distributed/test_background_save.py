"""Checkpoints are written beside training and hold the states of the step they are named after."""

from __future__ import annotations

import signal

import torch

from forgetscale.engine.ledger import read_ledger
from tests.distributed.fault_cases import difference
from tests.distributed.harness import RankServer
from tests.distributed.runs import SSU, Runs, read_lines
from tests.distributed.test_checkpoint_resume import folder_of, steps_of


def test_training_goes_on_while_the_states_of_an_earlier_step_are_written(
    ranks: RankServer, runs: Runs
):
    recipe = runs.recipe("slow-disk", SSU, {"train.checkpoint_every_steps": 3})
    crash = ranks.run("crash:train_with_slow_disk", 1, recipe=recipe, step=5)
    assert crash.codes == [-signal.SIGKILL]
    assert steps_of(folder_of(recipe)) == ["step-00000003"]
    done = read_lines(folder_of(recipe) / "metrics.jsonl")[-1]["step"]
    assert done >= 5, "training waited for the disk"
    again = ranks.must("training:command", 1, recipe=recipe)
    assert "resumed from" in again.logs[0]
    assert difference(folder_of(recipe), runs.get("ssu", 1)) is None


def test_a_save_waits_for_the_one_before_it_and_is_counted(ranks: RankServer, runs: Runs):
    recipe = runs.recipe("back-pressure", SSU, {"train.checkpoint_every_steps": 1})
    ranks.must("crash:train_with_disk_slower_than_saves", 2, recipe=recipe, saves=6)
    folder = folder_of(recipe)
    assert difference(folder, runs.get("ssu", 2)) is None
    saved = [line for line in read_ledger(folder / "ledger.jsonl") if line["event"] == "saved"]
    assert [line["step"] for line in saved] == [1, 2, 3, 4, 5, 6]
    assert all(line["in_background"] and line["num_bytes"] > 0 for line in saved)
    assert saved[0]["waited_seconds"] == 0
    assert all(line["waited_seconds"] > 0 for line in saved[1:])
    assert all(line["stall_seconds"] <= line["total_seconds"] for line in saved)
    metrics = read_lines(folder / "metrics.jsonl")
    waits = [line["checkpoint/num_waits"] for line in metrics if "checkpoint/num_waits" in line]
    assert waits == [1, 2, 3, 4], "the last is in the ledger alone"
    assert steps_of(folder) == ["step-00000005", "step-00000006"]


def test_both_modes_give_the_same_bits(ranks: RankServer, runs: Runs):
    sync = runs.get("ssu", 1, train__checkpoint_mode="sync")
    assert all(torch.equal(sync.export[k], v) for k, v in runs.get("ssu", 1).export.items())
    saved = [line for line in read_ledger(sync.folder / "ledger.jsonl") if line["event"] == "saved"]
    assert [line["in_background"] for line in saved] == [False] * 3
    assert all(line["waited_seconds"] == 0 for line in saved)


def test_without_memory_for_copies_training_waits_and_says_so(ranks: RankServer, runs: Runs):
    recipe = runs.recipe("little-memory", SSU)
    outcome = ranks.must("crash:train_with_little_memory", 2, recipe=recipe)
    lines = [line for line in outcome.logs[0].splitlines() if "of host memory left" in line]
    assert len(lines) == 1 and "training waits for this and every other save" in lines[0]
    assert difference(folder_of(recipe), runs.get("ssu", 2)) is None
    events = read_ledger(folder_of(recipe) / "ledger.jsonl")
    assert [e["event"] for e in events] == ["started", "saved", "saved", "saved"]
    assert not any(e["in_background"] for e in events[1:])

"""Runs that lose too much: every action of the retention gate, on one and two ranks."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from forgetscale.data import tokenizer_hash, write_token_set
from forgetscale.engine.ledger import read_ledger
from tests.distributed import tiny
from tests.distributed.harness import Outcome, RankServer
from tests.distributed.runs import SSU, Run, Runs, load_weights, read_lines

TASK = "perplexity/source"


@pytest.fixture(scope="module")
def task_dir(runs: Runs) -> Path:
    """A token set that training on skewed tokens makes worse."""
    folder = runs.world() / "gate-tasks"
    rows = np.random.default_rng(3).integers(40, tiny.VOCAB_SIZE, (6, tiny.BLOCK_SIZE))
    write_token_set(
        folder / TASK,
        rows,
        vocab_size=tiny.VOCAB_SIZE,
        tokenizer_sha256=tokenizer_hash(runs.world() / "model"),
        num_text_bytes=rows.size * 3,
    )
    return folder


def recipe_of(runs: Runs, task_dir: Path, name: str, **more: Any) -> dict:
    action = more.pop("action")
    section = {
        "every_steps": 2,
        "task_dir": str(task_dir),
        "budgets": [{"task": TASK, "max_drop": more.pop("max_drop", 0.05), "action": action}],
        **more,
    }
    return runs.recipe(name, SSU, {"retention": section})


def start(ranks: RankServer, runs: Runs, recipe: dict, size: int) -> Outcome:
    name = recipe["run"]["name"]
    path = tiny.write_recipe(runs.world() / f"{name}.yaml", recipe)
    return ranks.run("cli:run", size, arguments=["train", "--config", str(path)])


def decisions(folder: Path) -> list[tuple[int, str]]:
    lines = read_ledger(folder / "ledger.jsonl")
    return [(line["step"], line["action"]) for line in lines if line["event"] == "retention"]


def assert_rates(folder: Path, plain: Run, factors: list[float]) -> None:
    """Check that learning rates are these shares of the undisturbed run's."""
    found = [line["lr"] for line in read_lines(folder / "metrics.jsonl")]
    expected = [line["lr"] * f for line, f in zip(plain.metrics, factors, strict=True)]
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.long), 2])
@pytest.mark.parametrize("action", ["warn", "lower_lr", "roll_back", "stop"])
def test_each_action(ranks: RankServer, runs: Runs, task_dir: Path, action: str, size: int):
    name = f"gate-{action}-{size}"
    recipe = recipe_of(runs, task_dir, name, action=action, lr_factor=0.01, max_actions=4)
    outcome = start(ranks, runs, recipe, size)
    folder = runs.world() / name
    taken = decisions(folder)
    plain = runs.get("ssu", size)
    (source,) = [
        line for line in read_ledger(folder / "ledger.jsonl") if line["event"] == "retention_source"
    ]
    assert source["results"][0]["task"] == TASK
    if action == "stop":
        assert outcome.codes == [1] * size, outcome.logs
        assert "retention: at step" in outcome.logs[0] and "the run stops here" in outcome.logs[0]
        step = taken[-1][0]
        assert taken[-1][1] == "stop" and not (folder / "export").exists()
        assert (folder / "checkpoints" / f"step-{step:08d}").is_dir()
        again = start(ranks, runs, recipe, size)
        assert again.codes == [1] * size, "it stays stopped"
        assert decisions(folder) == taken
        recipe["retention"]["budgets"][0]["max_drop"] = 100.0
        assert start(ranks, runs, recipe, size).codes == [0] * size, "until the budget is raised"
        assert load_equal(folder, plain.export)
        return
    assert outcome.codes == [0] * size, outcome.logs
    kept = read_lines(folder / "results" / "retention.jsonl")
    if action == "warn":
        assert taken == [(2, "none"), (4, "warn"), (6, "warn")]
        assert [line["step"] for line in kept] == [2, 4, 6]
        assert load_equal(folder, plain.export), "a warning changes nothing"
    if action == "lower_lr":
        assert taken[:2] == [(2, "none"), (4, "lower_lr")]
        assert_rates(folder, plain, [1, 1, 1, 1, 0.01, 0.01])
    if action == "roll_back":
        assert taken == [(2, "none"), (4, "roll_back"), (4, "none"), (6, "none")]
        assert [line["step"] for line in kept] == [2, 4, 6], "those that count"
        assert {line["action"] for line in kept} == {"none"}
        assert_rates(folder, plain, [1, 1, 0.01, 0.01, 0.01, 0.01])
        assert [line["step"] for line in read_lines(folder / "metrics.jsonl")] == [*range(1, 7)]


def load_equal(folder: Path, expected: dict[str, torch.Tensor]) -> bool:
    found = load_weights(folder / "export")
    return all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_one_and_two_ranks_decide_alike(runs: Runs, ranks: RankServer, task_dir: Path):
    taken = []
    for size in (1, 2):
        name = f"alike-{size}"
        recipe = recipe_of(runs, task_dir, name, action="roll_back", lr_factor=0.3, max_actions=2)
        start(ranks, runs, recipe, size)
        taken.append(decisions(runs.world() / name))
    assert taken[0] == taken[1] and (4, "roll_back") in taken[0]


@pytest.mark.parametrize(
    "after", ["the decision", pytest.param("the removal", marks=pytest.mark.long)]
)
def test_a_kill_in_a_roll_back_is_finished_by_the_next_start(
    ranks: RankServer, runs: Runs, task_dir: Path, after: str
):
    whole = recipe_of(runs, task_dir, f"undisturbed-{after[4]}", action="roll_back", lr_factor=0.01)
    assert start(ranks, runs, whole, 2).codes == [0, 0]
    recipe = recipe_of(runs, task_dir, f"killed-{after[4]}", action="roll_back", lr_factor=0.01)
    outcome = ranks.run("retention:train_and_die", 2, recipe=recipe, after=after)
    assert -signal.SIGKILL in outcome.codes
    assert start(ranks, runs, recipe, 2).codes == [0, 0]
    folders = [Path(item["run"]["output_dir"]) for item in (whole, recipe)]
    assert decisions(folders[0]) == decisions(folders[1])
    assert load_equal(folders[1], load_weights(folders[0] / "export"))


def test_after_a_roll_back_the_run_may_end(ranks: RankServer, runs: Runs, task_dir: Path):
    recipe = recipe_of(runs, task_dir, "back-and-stop", action="roll_back", after_roll_back="stop")
    outcome = start(ranks, runs, recipe, 2)
    assert outcome.codes == [1, 1]
    assert "and the run is back at step 2" in outcome.logs[0]
    names = [path.name for path in (runs.world() / "back-and-stop" / "checkpoints").glob("step-*")]
    assert sorted(names) == ["step-00000000", "step-00000002"]


def test_a_gate_that_comes_too_late_or_names_what_is_not_there(
    ranks: RankServer, runs: Runs, task_dir: Path
):
    recipe = recipe_of(runs, task_dir, "missing", action="warn")
    recipe["retention"]["budgets"][0]["task"] = "perplexity/sources"
    outcome = start(ranks, runs, recipe, 1)
    assert outcome.codes == [2] and "nearest: 'perplexity/source'" in outcome.logs[0]
    run = runs.recipe("late", SSU, {"train.num_steps": 6})
    stopped = ranks.run(
        "crash:train_until",
        1,
        recipe=run,
        point="in a step, before the optimizer",
        number=4,
    )
    assert stopped.codes == [-signal.SIGKILL]
    late = recipe_of(runs, task_dir, "late", action="warn")
    outcome = start(ranks, runs, late, 1)
    assert outcome.codes == [2], outcome.logs
    assert "was not measured on the source model when this run started" in outcome.logs[0]
    assert json.loads((runs.world() / "late" / "checkpoints" / "latest").read_text())["step"] >= 2

"""A run that both the ladder of bad steps and the retention gate want to send back.

One row makes step 6 NaN; the gate measures every second step. The run must end as one that has the
same gate and never saw the row, on two ranks, to the bit.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from forgetscale.data import tokenizer_hash, write_token_set
from forgetscale.engine.ledger import read_ledger
from tests.distributed import tiny
from tests.distributed.harness import Job, RankServer
from tests.distributed.runs import SSU, Runs, load_weights, read_lines

TASK = "perplexity/source"
ACTIONS = ("lower_lr", pytest.param("roll_back", marks=pytest.mark.long))
STEPS, EVERY, BAD_STEP = 11, 3, 6
RATES = {"lower_lr": 0.5, "roll_back": 0.01}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    world = tiny.make_poisoned_world(tmp_path_factory.mktemp("both"))
    rows = np.random.default_rng(3).integers(40, tiny.POISON_TOKEN, (6, tiny.BLOCK_SIZE))
    write_token_set(
        world / "tasks" / TASK,
        rows,
        vocab_size=tiny.VOCAB_SIZE,
        tokenizer_sha256=tokenizer_hash(world / "model"),
        num_text_bytes=rows.size * 3,
    )
    (world / "skip.jsonl").write_text(json.dumps({"row": tiny.POISON_ROW}) + "\n")
    return world


@pytest.fixture(scope="module")
def folders(request, ranks: RankServer, runs: Runs, world: Path) -> dict[bool, Path]:
    """Whether the row is seen -> run folder, with the gate's action given; both side by side."""
    action = request.param
    section = {
        "every_steps": 2,
        "task_dir": str(world / "tasks"),
        "budgets": [{"task": TASK, "max_drop": 0.05, "action": action}],
        "lr_factor": RATES[action],
        "max_actions": 10,
    }
    jobs, found = [], {}
    for seen in (True, False):
        changes: dict[str, Any] = {"train.num_steps": STEPS, "retention": section}
        changes |= {"train.checkpoint_every_steps": EVERY}
        skips = str(world / "skip.jsonl")
        changes |= {"guard.max_skips": 1} if seen else {"data.skip_rows": skips}
        name = f"{action}-{seen}"
        recipe = runs.recipe(name, SSU, changes, world)
        path = tiny.write_recipe(world / f"{name}.yaml", recipe)
        jobs.append(Job("cli:run", {"arguments": ["train", "--config", str(path)]}, 2))
        found[seen] = world / name
    for outcome in ranks.run_all(jobs):
        assert outcome.codes == [0, 0], outcome.logs
    return found


def decisions(folder: Path) -> list[dict[str, Any]]:
    return [e for e in read_ledger(folder / "ledger.jsonl") if e["event"] == "retention"]


def what(decision: dict[str, Any]) -> tuple[int, str, float]:
    return decision["step"], decision["action"], decision["lr_factor"]


@pytest.mark.parametrize("folders", ACTIONS, indirect=True)
def test_the_end_is_that_of_a_run_that_never_saw_the_row(folders):
    both, expected = folders[True], folders[False]
    found, weights = (load_weights(folder / "export") for folder in (both, expected))
    assert all(torch.equal(found[name], weight) for name, weight in weights.items())
    lines = [read_lines(folder / "metrics.jsonl") for folder in (both, expected)]
    for name in ("step", "loss", "lr", "retention/lr_factor"):
        assert [x[name] for x in lines[0]] == [x[name] for x in lines[1]], name
    assert lines[0][-1]["retention/lr_factor"] < 1, "the gate never acted"


@pytest.mark.parametrize("folders", ACTIONS[:1], indirect=True)
def test_a_rate_that_was_lowered_after_the_checkpoint_is_decided_again(folders):
    both = folders[True]
    events = read_ledger(both / "ledger.jsonl")
    (at,) = [i for i, event in enumerate(events) if event["event"] == "rolling_back"]
    before = [what(e) for e in events[:at] if e["event"] == "retention"]
    after = [what(e) for e in events[at:] if e["event"] == "retention"]
    assert (events[at]["step"], events[at]["to_step"]) == (BAD_STEP, EVERY)
    assert before == [(2, "none", 1.0), (4, "lower_lr", 0.5)], "the bad step was not measured"
    assert after[0] == (4, "lower_lr", 0.5), "lowered once, not twice"
    kept = [what(d) for d in decisions(folders[False])]
    assert before[:1] + after == kept


@pytest.mark.parametrize("folders", ACTIONS[1:], indirect=True)
def test_a_roll_back_of_the_gate_outlives_one_of_the_ladder(folders):
    both = folders[True]
    taken = [what(d) for d in decisions(both)]
    assert taken[:2] == [(2, "none", 1.0), (4, "roll_back", 0.01)]
    assert taken == [what(d) for d in decisions(folders[False])]
    events = read_ledger(both / "ledger.jsonl")
    (ladder,) = [e for e in events if e["event"] == "rolling_back"]
    assert (ladder["step"], ladder["to_step"]) == (BAD_STEP, 4), "what the gate saved serves both"
    (entry,) = read_lines(both / "skip_list.jsonl")
    assert entry["row"] == tiny.POISON_ROW

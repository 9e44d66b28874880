"""The audit notices one flipped bit in a frozen element, wherever and whenever it happens."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.distributed.harness import RankServer
from tests.distributed.runs import MASKED, SSU, Runs, change

NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("where", "copy", "method"),
    [
        ("master", "fp32 master", MASKED),
        ("working", "working copy", MASKED),
        ("working", "working copy", SSU),
    ],
)
@pytest.mark.parametrize("size", [1, 2])
def test_a_flipped_bit_stops_the_run(ranks, runs: Runs, where, copy, method, size: int):
    name = f"tamper-{where}-{size}-{method.get('layout')}"
    # Step 5 is audited and not saved: the flipped bit must not be overwritten by a step before.
    changes = {"train.audit_every_steps": 1, "train.checkpoint_mode": "sync"}
    recipe = runs.recipe(name, method, changes)
    outcome = ranks.run("tamper:train", size, recipe=recipe, where=where, step=5, rank=size - 1)
    assert outcome.codes == [1] * size and not outcome.late
    assert outcome.kinds == ["AuditError"] * size
    for message in outcome.errors:
        assert message.startswith(f"freeze audit at step 5: rank {size - 1} holds a changed frozen")
        assert NAME in message and copy in message and "\n" not in message
    checkpoints = sorted(p.name for p in (runs.world() / name / "checkpoints").glob("step-*"))
    assert checkpoints == ["step-00000002", "step-00000004"]
    assert not (runs.world() / name / "export").exists()


def test_audit_comes_before_the_checkpoint(ranks, runs: Runs):
    recipe = runs.recipe("tamper-save", SSU, {"train.checkpoint_mode": "sync"})
    outcome = ranks.run("tamper:train", 2, recipe=recipe, where="master", step=4, rank=0)
    assert outcome.kinds == ["AuditError"] * 2
    folder = runs.world() / "tamper-save" / "checkpoints"
    assert [p.name for p in folder.glob("step-*")] == ["step-00000002"]


@pytest.mark.parametrize("method", [SSU, MASKED])
def test_a_bit_flipped_on_the_way_to_the_export(ranks, runs: Runs, method: dict):
    recipe = runs.recipe(f"tamper-export-{method.get('layout')}", method)
    outcome = ranks.run("tamper:train", 2, recipe=recipe, where="export", step=0, rank=0)
    assert outcome.kinds == ["AuditError"] * 2
    assert all(
        f"frozen elements of {NAME} differ from the source model" in message
        for message in outcome.errors
    )
    folder = Path(recipe["run"]["output_dir"])
    names = sorted(path.name[:10] for path in folder.glob("export*"))
    assert names == ["export.bad"], "a wrong export must not stand under its name"


def test_a_checkpoint_of_other_weights_is_noticed(ranks: RankServer, runs: Runs):
    """Its hashes are right, its frozen elements are not those of the source."""
    good = runs.get("ssu", 1)
    folder = good.folder.with_name("foreign-checkpoint")
    shutil.copytree(good.folder, folder)
    for step in (4, 6):
        ranks.must("tamper:edit_checkpoint", 1, folder=f"{folder}/checkpoints/step-0000000{step}")
    recipe = change(good.recipe, {"run.output_dir": str(folder)})
    outcome = ranks.run("training:command", 1, recipe=recipe)
    assert outcome.kinds == ["AuditError"], outcome.logs[0][-2000:]
    assert "freeze audit at step 6" in outcome.errors[0]


def test_audit_counts_whole_and_row_and_column_plans(runs: Runs):
    for method in ("ssu", "hft"):
        log = (runs.get(method, 2).folder / "log.txt").read_text()
        planned = sum(bool(mask.any()) for mask in runs.get(method, 2).frozen.values())
        assert f"freeze audit compared {planned} tensors with the source" in log

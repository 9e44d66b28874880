"""Restoring from a ZeRO-3 checkpoint writes what restoring from its export writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from forgetscale.cli import main
from tests.distributed.runs import MASKED, SSU, Run, Runs, load_weights


def newest(run: Run) -> Path:
    return sorted((run.folder / "checkpoints").glob("step-*"))[-1]


def restored(run: Run, tuned: Path, output: Path) -> dict[str, torch.Tensor]:
    options = ["--fraction", "0.3", "--include", ".", "--workers", "1"]
    source = run.world_folder / "model"
    given = ["--source", str(source), "--tuned", str(tuned), "--output", str(output)]
    assert main(["restore", *given, *options]) == 0
    return load_weights(output)


def assert_same(run: Run, tmp_path: Path) -> None:
    export = restored(run, run.folder / "export", tmp_path / "export")
    ranks = restored(run, newest(run), tmp_path / "ranks")
    assert export.keys() == ranks.keys()
    moved = 0
    for name, value in export.items():
        assert value.dtype == ranks[name].dtype and torch.equal(value, ranks[name]), name
        moved += int((value != run.source[name]).sum())
    assert moved > 0


@pytest.mark.parametrize("size", [1, 2, 3])
def test_cut_matrices(runs: Runs, tmp_path: Path, size: int):
    assert_same(runs.get("ssu", size), tmp_path)


def test_whole_matrices(runs: Runs, tmp_path: Path):
    assert_same(runs.get("sft", 2), tmp_path)


def test_matrices_cut_by_rows(runs: Runs, tmp_path: Path):
    assert_same(runs.get({**SSU, "axis": "row"}, 2), tmp_path)


def test_masks(runs: Runs, tmp_path: Path):
    assert_same(runs.get(MASKED, 2), tmp_path)


def test_working_copies_are_bf16(runs: Runs, tmp_path: Path):
    world = runs.world("bf16", dtype=torch.bfloat16)
    run = runs.get("ssu", 2, world=world, offload=False, model__dtype="bfloat16")
    assert_same(run, tmp_path)
    assert {v.dtype for v in load_weights(tmp_path / "ranks").values()} == {torch.bfloat16}

"""A training run that lasts long enough to be disturbed, and what it must end with."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

from tests.distributed import tiny
from tests.distributed.runs import SSU, change, load_weights, read_lines

NUM_STEPS = 120


def write_recipe(world: Path, name: str, changes: dict | None = None) -> tuple[Path, Path]:
    """Write a recipe of 120 steps, a checkpoint every 40; return its file and its run folder."""
    recipe = change(
        tiny.base_recipe(world, name, **SSU),
        {"train.num_steps": NUM_STEPS, "train.checkpoint_every_steps": 40} | (changes or {}),
    )
    return tiny.write_recipe(world / f"{name}.yaml", recipe), world / name


def wait_for(what: Callable[[], bool], seconds: float = 240.0) -> None:
    """Wait until something holds."""
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def steps_of(folder: Path) -> list[int]:
    """Return the steps in the metrics of a run."""
    path = folder / "metrics.jsonl"
    return [line["step"] for line in read_lines(path)] if path.is_file() else []


def assert_same_weights(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    """Compare the exported weights of a run bit by bit."""
    found = load_weights(folder / "export")
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name

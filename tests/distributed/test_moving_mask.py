"""Gradient-mask tuning in real runs: what a step masks does not move in it, decay included."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.harness import RankServer
from tests.distributed.runs import Runs

# ranks, working type, offload, accumulation type
SETTINGS = [
    (1, "float32", False, "float32"),
    (3, "float32", True, "float32"),
    (2, "bfloat16", False, "bfloat16"),
    (2, "bfloat16", True, "float32"),
]


def watch(ranks: RankServer, runs: Runs, kind: str, setting: tuple) -> dict[str, int]:
    size, dtype, offload, accumulation = setting
    world = runs.world() if dtype == "float32" else runs.world("bf16", dtype=torch.bfloat16)
    changes = {"model.dtype": dtype, "train.accumulation_dtype": accumulation}
    changes |= {"optim.schedule": "constant", "optim.warmup_fraction": 0.0}
    if offload:
        changes["deepspeed"] = str(world / "zero3_offload.json")
    name = f"watch-{kind}-{size}-{dtype}-{offload}"
    recipe = runs.recipe(name, {"kind": kind, "trainable_fraction": 0.3}, changes, world)
    found = ranks.must("moving:watch", size, recipe=recipe).values
    return {key: sum(value[key] for value in found) for key in found[0]}


@pytest.mark.parametrize("setting", SETTINGS)
def test_masked_elements_stand_still_and_the_others_move(ranks, runs: Runs, setting: tuple):
    count = watch(ranks, runs, "gmt", setting)
    total = count["masked"] + count["kept"]
    assert count["changed"] == 0
    assert abs(count["kept"] / total - 0.3) < 0.01
    assert count["kept_changed"] > 0.999 * count["kept"]


def test_the_published_code_lets_momentum_and_decay_move_them(ranks, runs: Runs):
    count = watch(ranks, runs, "gmt_official", SETTINGS[0])
    assert count["changed"] > 0.9 * count["masked"]

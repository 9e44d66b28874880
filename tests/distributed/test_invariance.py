"""What must not change a step: micro-batches, activation checkpointing, chunks, buckets."""

from __future__ import annotations

import json

import pytest
import torch

from tests.distributed.compare import assert_same_weights
from tests.distributed.runs import Run, Runs


def assert_same(run: Run, expected: Run) -> None:
    assert run.losses == pytest.approx(expected.losses, rel=2e-6)
    norms = [[line["grad_norm"] for line in item.metrics] for item in (run, expected)]
    assert norms[0] == pytest.approx(norms[1], rel=2e-5)
    assert_same_weights(run.masters, expected.masters)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(
    "micro",
    [1, pytest.param(3, marks=pytest.mark.long), pytest.param(7, marks=pytest.mark.long), 16],
)
def test_micro_batch_size_does_not_change_the_step(runs: Runs, size: int, micro: int):
    assert_same(runs.get("ssu", size, train__micro_batch_size=micro), runs.get("ssu", size))


@pytest.mark.parametrize("size", [1, 2])
def test_activation_checkpointing_gives_the_same_gradients(runs: Runs, size: int):
    run = runs.get("ssu", size, model__activation_checkpointing=True)
    assert_same(run, runs.get("ssu", size))


def test_activation_checkpointing_is_at_work(ranks, runs: Runs):
    recipe = runs.recipe("recompute", changes={"model.activation_checkpointing": True})
    plain = runs.recipe("recompute-not")
    counts = {
        name: ranks.must("training:count_forwards", 1, recipe=value).value
        for name, value in (("with", recipe), ("without", plain))
    }
    assert counts["with"] == 2 * counts["without"]


@pytest.mark.parametrize(
    "chunk",
    [1, pytest.param(5, marks=pytest.mark.long), pytest.param(1024, marks=pytest.mark.long)],
)
def test_loss_chunks(runs: Runs, chunk: int):
    assert_same(runs.get("ssu", 2, train__loss_chunk_size=chunk), runs.get("ssu", 2))


@pytest.mark.parametrize(
    "settings",
    [
        {"reduce_bucket_size": 500, "stage3_prefetch_bucket_size": 300},
        {"sub_group_size": 1000},
        {"stage3_param_persistence_threshold": 0},
        {"overlap_comm": False},
        {"contiguous_gradients": False},
        {"stage3_max_live_parameters": 100, "stage3_max_reuse_distance": 100},
    ],
    ids=lambda s: next(iter(s)),
)
@pytest.mark.parametrize("offload", [pytest.param(False, marks=pytest.mark.long), True])
def test_accepted_deepspeed_settings(runs: Runs, settings: dict, offload: bool):
    name = "zero3_offload.json" if offload else "zero3.json"
    config = json.loads((runs.world() / name).read_text())
    config["zero_optimization"] |= settings
    path = runs.world() / f"{next(iter(settings))}-{offload}.json"
    path.write_text(json.dumps(config))
    run = runs.get("ssu", 2, deepspeed=str(path))
    assert_same(run, runs.get("ssu", 2))
    for key, frozen in run.frozen.items():
        assert torch.equal(run.export[key][frozen], run.source[key][frozen])


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_communication_type(runs: Runs, kind: str):
    world = runs.world("bf16", dtype=torch.bfloat16)
    config = json.loads((world / "zero3.json").read_text()) | {"communication_data_type": kind}
    path = world / f"communication-{kind}.json"
    path.write_text(json.dumps(config))
    run = runs.get("ssu", 2, world=world, model__dtype="bfloat16", deepspeed=str(path))
    expected = runs.get("ssu", 2, world=world, model__dtype="bfloat16")
    assert run.losses == pytest.approx(expected.losses, rel=1e-2)
    for name, frozen in run.frozen.items():
        assert torch.equal(run.export[name][frozen], run.source[name][frozen])


def test_more_ranks_than_rows(runs: Runs):
    # The third rank has no row in any step and still takes part.
    few = {"train__global_batch_size": 2}
    one, three = runs.get("ssu", 1, **few), runs.get("ssu", 3, **few)
    assert_same(three, one)
    assert three.outcome.values[0]["rows"][0] == [] or three.outcome.values[2]["rows"][0] == []


@pytest.mark.parametrize("accumulation", ["float32", "bfloat16"])
def test_accumulation_type_keeps_frozen_bits(runs: Runs, accumulation: str):
    world = runs.world("bf16", dtype=torch.bfloat16)
    run = runs.get(
        "ssu", 2, world=world, model__dtype="bfloat16", train__accumulation_dtype=accumulation
    )
    for name, frozen in run.frozen.items():
        assert torch.equal(run.export[name][frozen], run.source[name][frozen])


@pytest.mark.parametrize("schedule", ["linear", "constant"])
def test_schedules_reach_the_optimizer(runs: Runs, schedule: str):
    run = runs.get("sft", 1, optim__schedule=schedule)
    rates = [line["lr"] for line in run.metrics]
    expected = {
        "linear": [0, 0.005, 0.01, 0.0075, 0.005, 0.0025],
        "constant": [0, 0.005, 0.01, 0.01, 0.01, 0.01],
    }
    assert rates == pytest.approx(expected[schedule])

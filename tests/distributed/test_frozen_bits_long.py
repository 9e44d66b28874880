"""Two hundred steps with strong decay and clipping, a stop and a resume on the way: not one bit."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

from tests.distributed.harness import RankServer
from tests.distributed.runs import MASKED, SSU, Run, Runs

CHANGES = {
    "train.num_steps": 200,
    "train.checkpoint_every_steps": 80,
    "optim.weight_decay": 0.1,
    "optim.max_grad_norm": 0.5,
}


@pytest.mark.long
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("method", [SSU, MASKED], ids=["compact", "masked"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_frozen_bits_after_200_steps(ranks: RankServer, runs: Runs, method, offload, dtype):
    world = runs.world(f"long-{dtype}", dtype=getattr(torch, dtype))
    name = f"long-{method.get('layout', 'compact')}-{offload}"
    recipe = runs.recipe(name, method, {**CHANGES, "model.dtype": dtype}, world)
    if offload:
        recipe["deepspeed"] = str(world / "zero3_offload.json")
    options = {"step": 117, "rank": 1, "number": int(signal.SIGUSR1)}
    stopped = ranks.run("crash:train_and_signal", 2, recipe=recipe, limit=600, **options)
    assert stopped.codes == [75, 75]
    outcome = ranks.must("training:train", 2, recipe=recipe, limit=600)
    run = Run(Path(recipe["run"]["output_dir"]), world, recipe, outcome)
    assert run.metrics[-1]["step"] == 200
    count = 0
    for name, frozen in run.frozen.items():
        source = run.source[name]
        assert torch.equal(run.export[name][frozen], source[frozen]), name
        assert torch.equal(run.masters[name][frozen], source[frozen].float()), name
        count += int(frozen.sum())
    assert count > 0.3 * sum(weight.numel() for weight in run.source.values())

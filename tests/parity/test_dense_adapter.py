"""The ZeRO-3 adapter run against PEFT's own layers in fp64: losses, norms, factors."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.distributed import tiny
from tests.distributed.compare import assert_same_weights
from tests.distributed.harness import RankServer
from tests.distributed.runs import Run, Runs
from tests.parity import reference
from tests.parity.test_dense_reference import batches_of, settings_of

LORA = {"kind": "lora", "rank": 3, "alpha": 12}
pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)


def train_with_peft(run: Run, start: dict[str, Tensor], rslora: bool) -> reference.Trained:
    """Train PEFT's layers, whole batches, masters in fp64."""
    model = AutoModelForCausalLM.from_pretrained(
        run.world_folder / "model", dtype=torch.float64, attn_implementation="eager"
    )
    config = peft.LoraConfig(
        r=3, lora_alpha=12, target_modules="all-linear", use_rslora=rslora, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(model, config).double()
    params = {
        name.removeprefix("base_model.model.").removesuffix(".default.weight"): value
        for name, value in model.named_parameters()
        if value.requires_grad
    }
    assert set(params) == set(start)
    with torch.no_grad():
        for name, value in params.items():
            value.copy_(start[name])
    masters = {name: value.detach() for name, value in params.items()}
    allowed = {name: torch.ones_like(v, dtype=torch.bool) for name, v in masters.items()}
    optimizer = reference.AdamW(masters, allowed, settings_of(run.recipe))
    losses, norms = [], []
    for number, ids in enumerate(batches_of(run)):
        loss = reference.mean_loss(model(ids).logits, ids)
        grads = torch.autograd.grad(loss, list(params.values()))
        losses.append(float(loss.detach()))
        norms.append(optimizer.step(number, dict(zip(params, grads, strict=True))))
    return reference.Trained(losses, norms, masters)


@pytest.mark.parametrize(("size", "rslora"), [(1, False), (3, False), (2, True)])
def test_fp32_run_equals_peft(ranks: RankServer, runs: Runs, size: int, rslora: bool):
    run = runs.get({"kind": "sft"}, size, adapter=LORA | {"rslora": rslora})
    recipe = runs.recipe("adapter-parity", {"kind": "sft"}, {"adapter": LORA})
    start = ranks.must("adapters:start", 1, recipe=recipe).value
    expected = train_with_peft(run, start, rslora)
    assert tiny.SIZES["num_hidden_layers"] * 7 * 2 == len(expected.weights)
    assert run.losses == pytest.approx(expected.losses, rel=2e-6)
    norms = [line["grad_norm"] for line in run.metrics]
    assert norms == pytest.approx(expected.norms, rel=2e-5)
    assert max(norms) > run.recipe["optim"]["max_grad_norm"], "clipping must be at work"
    assert_same_weights(run.outcome.value["factors"], expected.weights)

"""AdaLoRA on slices against PEFT's own model and rank allocator in fp64."""

from __future__ import annotations

import signal

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.distributed.compare import assert_same_weights
from tests.distributed.harness import RankServer
from tests.distributed.runs import PROBE, Run, Runs, read_lines
from tests.parity import reference
from tests.parity.test_dense_reference import batches_of, settings_of

SVD = {"kind": "svd", "rank": 4, "alpha": 16}
METHOD = {
    "kind": "adalora",
    "target_rank": 2,
    "shrink_from_step": 1,
    "shrink_until_step": 8,
    "interval": 2,
    "orthogonality": 0.3,
}
STEPS = 10
CHANGES = {
    "adapter": SVD,
    "train__num_steps": STEPS,
    "optim__max_grad_norm": 1e6,
    "optim__lr": 3e-2,
}
pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)


def get(runs: Runs, size: int) -> Run:
    return runs.get(METHOD, size, **CHANGES)


def short(name: str) -> str:
    return name.removeprefix("base_model.model.").removesuffix(".default")


@pytest.fixture(scope="module")
def expected(ranks: RankServer, runs: Runs):
    """Losses, kept triplets after each step, factors: PEFT's model, its calls in its order."""
    run = get(runs, 1)
    recipe = runs.recipe("adalora-start", METHOD, {"adapter": SVD, "train.num_steps": STEPS})
    start = ranks.must("adapters:start", 1, recipe=recipe).value
    model = AutoModelForCausalLM.from_pretrained(
        run.world_folder / "model", dtype=torch.float64, attn_implementation="eager"
    )
    config = peft.AdaLoraConfig(
        init_r=4, target_r=2, lora_alpha=16, tinit=1, tfinal=STEPS - 8, deltaT=2,
        total_step=STEPS, orth_reg_weight=0.3, target_modules="all-linear", task_type="CAUSAL_LM",
    )  # fmt: skip
    model = peft.get_peft_model(model, config).double()
    # PEFT 0.21 leaves ``ranknum``, its divisor of the scale, trainable; it is a constant.
    params = {short(n): p for n, p in model.named_parameters() if "lora_" in n}
    assert set(params) == set(start)
    with torch.no_grad():
        for name, value in params.items():
            value.copy_(start[name])
    masters = {name: value.detach() for name, value in params.items()}
    allowed = {name: torch.ones_like(v, dtype=torch.bool) for name, v in masters.items()}
    optimizer = reference.AdamW(masters, allowed, settings_of(run.recipe))
    losses, ranks_after = [], []
    for number, ids in enumerate(batches_of(run)):
        found = model(ids, labels=ids)
        found.loss.backward()
        with torch.no_grad():
            losses.append(float(reference.mean_loss(found.logits, ids)))
        optimizer.step(number, {name: p.grad for name, p in params.items()})
        model.base_model.update_and_allocate(number + 1)
        model.zero_grad()
        values = [p for name, p in params.items() if name.endswith("lora_E")]
        ranks_after.append(sum(int((v != 0).sum()) for v in values) / len(values))
    with torch.no_grad():
        logits = model(torch.tensor(PROBE)).logits
    return losses, ranks_after, masters, logits


@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.long), 2, 3])
def test_losses_ranks_and_factors_are_pefts(runs: Runs, expected, size: int):
    losses, _, masters, logits = expected
    run = get(runs, size)
    assert run.losses == pytest.approx(losses, rel=5e-6)
    factors: dict[str, Tensor] = run.outcome.value["factors"]
    for name, value in masters.items():
        if name.endswith("lora_E"):
            assert torch.equal(factors[name] == 0, value == 0), f"other triplets kept: {name}"
    assert_same_weights(factors, masters)
    assert (run.outcome.value["logits"].double() - logits).abs().max() < 1e-4


def test_the_schedule_is_driven(runs: Runs, expected):
    _, ranks_after, masters, _ = expected
    run = get(runs, 2)
    mean_ranks = [line["method/mean_rank"] for line in run.metrics]
    assert mean_ranks[0] == 4.0 and mean_ranks[-1] == 2.0
    assert mean_ranks[-1] == ranks_after[-1]
    kept = [int((v != 0).sum()) for n, v in masters.items() if n.endswith("lora_E")]
    assert len(set(kept)) > 1, "layers keep different ranks"
    budgets = [line["method/budget"] for line in run.metrics]
    assert budgets == sorted(budgets, reverse=True) and budgets[7:] == [28.0] * 3


@pytest.mark.parametrize("stop", [3, pytest.param(9, marks=pytest.mark.long)])
def test_resumed_at_another_number_of_ranks(ranks: RankServer, runs: Runs, stop: int):
    """Importance (stop in the middle) and what is kept (after the last choice) are saved whole."""
    changes = {key.replace("__", "."): value for key, value in CHANGES.items()}
    recipe = runs.recipe(f"adalora-resumed-{stop}", METHOD, changes)
    options = {"recipe": recipe, "step": stop, "rank": 1, "number": int(signal.SIGUSR1)}
    assert ranks.run("crash:train_and_signal", 2, **options).codes == [75, 75]
    ranks.must("training:command", 3, recipe=recipe)
    folder = runs.world() / f"adalora-resumed-{stop}"
    whole = get(runs, 2)
    lines = read_lines(folder / "metrics.jsonl")
    assert [line["loss"] for line in lines] == pytest.approx(whole.losses, rel=5e-6)
    for name in ("method/mean_rank", "method/budget"):
        assert [line[name] for line in lines] == [line[name] for line in whole.metrics]


def test_the_exported_folder_loads_in_peft(runs: Runs, expected):
    run = get(runs, 1)
    base = AutoModelForCausalLM.from_pretrained(run.world_folder / "model", dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(base, run.folder / "export-adapter")
    with torch.no_grad():
        found = adapted(torch.tensor(PROBE)).logits
    assert (found - run.outcome.value["logits"]).abs().max() < 2e-5
    merged = AutoModelForCausalLM.from_pretrained(run.folder / "export", dtype=torch.float32)
    with torch.no_grad():
        assert (merged(torch.tensor(PROBE)).logits - found).abs().max() < 2e-5

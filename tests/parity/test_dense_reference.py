"""The ZeRO-3 run against the dense fp64 reference: plan, losses, norms and weights."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.distributed import tiny
from tests.distributed.compare import assert_same_weights
from tests.distributed.runs import SSU, Run, Runs
from tests.parity import reference

WORLDS = [1, 2, 3]


def settings_of(recipe: dict) -> reference.Settings:
    optim, train = recipe["optim"], recipe["train"]
    return reference.Settings(
        num_steps=train["num_steps"],
        lr=optim["lr"],
        weight_decay=optim["weight_decay"],
        max_grad_norm=optim["max_grad_norm"],
        warmup_steps=math.ceil(optim["warmup_fraction"] * train["num_steps"]),
    )


def batches_of(run: Run) -> list[torch.Tensor]:
    tokens = torch.from_numpy(tiny.set_rows(rows=40, seed=1)).long()
    return [tokens[rows] for rows in run.rows]


def frozen_of(run: Run) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    columns = {k[8:]: v.tolist() for k, v in run.plan.items() if k.startswith("columns/")}
    rows = {k[5:]: v.tolist() for k, v in run.plan.items() if k.startswith("rows/")}
    return columns, rows


@pytest.fixture(scope="session")
def dense(runs: Runs):
    """Reference of the ssu run, by source type and method."""
    made = {}

    def get(run: Run, dtype: torch.dtype = torch.float64) -> reference.Trained:
        key = (run.recipe["method"]["kind"], run.recipe["model"]["path"], dtype)
        if key not in made:
            columns, rows = frozen_of(run) if run.recipe["method"]["kind"] == "ssu" else ({}, {})
            made[key] = reference.train(
                run.world_folder / "model",
                batches_of(run),
                settings_of(run.recipe),
                columns,
                rows,
                dtype,
            )
        return made[key]

    return get


def test_the_reference_is_olmo2(runs: Runs):
    folder = runs.world() / "model"
    ids = torch.from_numpy(tiny.set_rows(rows=3, seed=9)).long()
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
        found = reference.DenseOlmo2(folder).logits(ids)
    assert (found - expected).abs().max() < 2e-5


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("method", ["ssu", "sft"])
def test_fp32_run_equals_the_reference(runs: Runs, dense, method: str, world: int):
    run = runs.get(method, world)
    expected = dense(run)
    assert len({tuple(sorted(step)) for step in run.rows}) == 6
    assert [len(step) for step in run.rows] == [7] * 6
    assert run.losses == pytest.approx(expected.losses, rel=2e-6)
    norms = [line["grad_norm"] for line in run.metrics]
    assert norms == pytest.approx(expected.norms, rel=2e-5)
    assert max(norms) > run.recipe["optim"]["max_grad_norm"], "clipping must be at work"
    assert_same_weights(run.masters, expected.weights)


def test_tied_embeddings_equal_the_reference(runs: Runs, dense):
    run = runs.get("ssu", 2, world=runs.world("tied", tied=True))
    expected = dense(run)
    assert run.losses == pytest.approx(expected.losses, rel=2e-6)
    assert "lm_head.weight" not in run.masters
    assert_same_weights(run.masters, expected.weights)


def test_reference_without_a_part_would_not_pass(runs: Runs, dense):
    run = runs.get("ssu", 1)
    columns, rows = frozen_of(run)
    batches, right = batches_of(run), dense(run).weights
    for field, value in (("weight_decay", 0.0), ("max_grad_norm", 1e9), ("warmup_steps", 0)):
        settings = settings_of(run.recipe)
        setattr(settings, field, value)
        wrong = reference.train(run.world_folder / "model", batches, settings, columns, rows)
        assert max(float((wrong.weights[n] - right[n]).abs().mean()) for n in right) > 1e-6, field


def test_losses_are_the_same_for_any_number_of_ranks(runs: Runs):
    for method in ("ssu", "sft"):
        first = runs.get(method, 1)
        for world in (2, 3):
            other = runs.get(method, world)
            assert other.losses == pytest.approx(first.losses, rel=1e-6)
            assert sum(other.rows, []) == sum(first.rows, [])


@pytest.mark.parametrize("score", ["paper", "official", "mag_l1", "mag_l2"])
def test_plan_equals_the_reference_plan(runs: Runs, score: str):
    run = runs.get({**SSU, "score": score}, 2)
    tokens = torch.from_numpy(tiny.set_rows(rows=19, seed=2)).long()
    used = tokens[list(range(0, 19, 2))[:7]]
    expected = reference.ssu_plan(run.world_folder / "model", used, score, 0.5)
    columns, rows = frozen_of(run)
    assert columns == expected
    assert rows == {"model.embed_tokens.weight": [1, 5], "lm_head.weight": [1, 5]}


@pytest.mark.parametrize("offload", [False, True])
def test_bf16_error_is_at_most_twice_that_of_plain_bf16(runs: Runs, dense, offload: bool):
    world = runs.world("bf16", dtype=torch.bfloat16)
    run = runs.get("ssu", 2, world=world, offload=offload, model__dtype="bfloat16")
    exact = dense(run)
    plain = plain_bf16(run)
    ours = total_error(run.masters, exact.weights)
    theirs = total_error(plain, exact.weights)
    assert ours <= 2 * theirs, (ours, theirs)
    assert run.losses == pytest.approx(exact.losses, rel=1e-2)


def total_error(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(float((found[n].double() - exact[n]).pow(2).sum()) for n in exact))


def plain_bf16(run: Run) -> dict[str, torch.Tensor]:
    """Train in plain PyTorch: ``transformers`` model in bf16, fp32 masters, whole batch at once."""
    model = AutoModelForCausalLM.from_pretrained(run.world_folder / "model", dtype=torch.bfloat16)
    params = dict(model.named_parameters())
    masters = {name: value.detach().float() for name, value in params.items()}
    columns, rows = frozen_of(run)
    optimizer = reference.AdamW(
        masters, reference.masks(masters, columns, rows), settings_of(run.recipe)
    )
    for number, ids in enumerate(batches_of(run)):
        loss = reference.mean_loss(model(ids).logits.float(), ids)
        grads = torch.autograd.grad(loss, list(params.values()))
        optimizer.step(number, {n: g.float() for n, g in zip(params, grads, strict=True)})
        with torch.no_grad():
            for name, value in params.items():
                value.copy_(masters[name])
    return masters


@pytest.mark.long
@pytest.mark.parametrize("seed", [21, 22, 23])
@pytest.mark.parametrize("size", [1, 3, 4])
def test_other_models(runs: Runs, dense, seed: int, size: int):
    run = runs.get("ssu", size, world=runs.world(f"seed-{seed}", seed=seed))
    expected = dense(run)
    assert run.losses == pytest.approx(expected.losses, rel=2e-6)
    assert_same_weights(run.masters, expected.weights)

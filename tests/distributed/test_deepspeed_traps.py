"""Traps of DeepSpeed's ZeRO-3: each test fails without our handling."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.distributed.harness import RankServer
from tests.distributed.runs import MASKED, PROBE, SSU, Runs, read_lines

MODES = [("float32", False), ("bfloat16", False), ("float32", True), ("bfloat16", True)]


@pytest.fixture(scope="module")
def config(runs: Runs):
    """Path of the DeepSpeed JSON with or without offload."""
    return lambda offload: str(runs.world() / ("zero3_offload.json" if offload else "zero3.json"))


def dense_adamw(weights: dict[str, torch.Tensor], grads: list[dict], lr: float) -> list[dict]:
    """Return weights after each step of plain AdamW without decay."""
    params = {name: torch.nn.Parameter(value.clone()) for name, value in weights.items()}
    optimizer = torch.optim.AdamW(list(params.values()), lr=lr, weight_decay=0.0)
    found = []
    for step in grads:
        for name, param in params.items():
            param.grad = step[name].clone()
        optimizer.step()
        found.append({name: param.detach().clone() for name, param in params.items()})
    return found


def part_weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    found = {f"{n}.weight": torch.randn(7, 5, generator=generator) for n in ("first", "second")}
    return found | {"third.weight": torch.tensor([[0.75]])}


def part_grads(weights: dict, step: list[str]) -> dict[str, torch.Tensor]:
    """Gradient of ``sum((W x)^2)`` over the micro-batches of a step."""
    found = {name: torch.zeros_like(w) for name, w in weights.items()}
    for number, parts in enumerate(step):
        x = torch.full((5,), 0.5 + 0.25 * number)
        for part in parts.split():
            weight = weights[f"{part}.weight"]
            part_x = x[: weight.shape[1]]
            found[f"{part}.weight"] += 2 * torch.outer(weight @ part_x, part_x)
    return found


class TestStaleGradients:
    """DeepSpeed's buffers keep the last gradient of a parameter that gets none."""

    @pytest.mark.parametrize("offload", [False, True])
    @pytest.mark.parametrize(
        "schedule",
        [
            [["first second third"], ["first"], ["first second"]],
            [["first", "first second"], ["third first", "first"], ["first", "first second third"]],
            [["first second", "third"], ["first second", "first"], ["third", "third"]],
        ],
        ids=["unused in a step", "first used in micro-batch 2", "unused in the last micro-batch"],
    )
    def test_an_old_gradient_never_serves_twice(self, ranks: RankServer, config, offload, schedule):
        made = ranks.must(
            "shards:stale_gradients",
            2,
            dtypes=["float32", "bfloat16"],
            config_path=config(offload),
            schedule=schedule,
        ).value
        # Forward and backward round in bf16; a gradient that serves twice moves a weight by 0.1.
        for dtype, close, far in (("float32", 1e-5, 1e-5), ("bfloat16", 1e-2, 3e-3)):
            kind = getattr(torch, dtype)
            start = {name: weight.to(kind).float() for name, weight in part_weights().items()}
            weights, grads = start, []
            for number, step in enumerate(schedule):
                used = {name: weight.to(kind).float() for name, weight in weights.items()}
                grads.append(part_grads(used, step))
                weights = dense_adamw(start, grads, 0.1)[-1]
                norm = math.sqrt(sum(float(g.square().sum()) for g in grads[-1].values()))
                assert made[dtype]["norms"][number] == pytest.approx(norm, rel=close), dtype
                for name, weight in weights.items():
                    found = made[dtype]["masters"][number][name]
                    assert torch.allclose(found, weight, rtol=0, atol=far), (dtype, number, name)


class TestGradients:
    @pytest.mark.parametrize(
        ("dtype", "offload", "accumulation"),
        [(*mode, "float32") for mode in MODES]
        + [("bfloat16", False, "bfloat16"), ("bfloat16", True, "bfloat16")],
    )
    def test_edits_reach_the_optimizer(self, ranks, config, dtype, offload, accumulation):
        found = ranks.must(
            "shards:edit_gradients",
            2,
            dtype=dtype,
            config_path=config(offload),
            accumulation=accumulation,
        ).value
        assert found["dtype"] == f"torch.{accumulation}"
        assert found["before"]["first.weight"].abs().max() > 0
        assert found["after"]["first.weight"].abs().max() == 0
        assert torch.equal(found["after"]["second.weight"], found["before"]["second.weight"] / 2)
        assert found["norm"] == pytest.approx(found["expected_norm"], rel=1e-4)
        assert found["decays"] == [0.0]

    @pytest.mark.parametrize(("dtype", "offload"), MODES)
    def test_clipping_counts_what_may_move(self, ranks, config, dtype, offload):
        found = ranks.must("shards:masked_norm", 3, dtype=dtype, config_path=config(offload)).value
        assert found["moving"] < 0.9 * found["whole"]
        assert found["clipped_by"] == pytest.approx(found["moving"], rel=1e-5)

    def test_gradients_are_summed_in_fp32_by_default(self, ranks, config):
        count = 40
        sums = {
            accumulation: ranks.must(
                "shards:many_small_gradients",
                2,
                config_path=config(False),
                accumulation=accumulation,
                count=count,
            ).value
            for accumulation in ("float32", "bfloat16")
        }
        weights = {n: w.bfloat16().double() for n, w in part_weights().items()}
        for name, weight in weights.items():
            x = torch.tensor([8.0] + [0.25] * (count - 1), dtype=torch.float64)
            exact = (2 * weight.sum(1) * x.square().sum())[:, None].expand(weight.shape).flatten()
            mine = exact[: -(-weight.numel() // 2)]  # the first rank's half
            errors = {k: float((v[name].double() - mine).norm()) for k, v in sums.items()}
            assert errors["float32"] < 0.5 * errors["bfloat16"], errors


class TestLayout:
    @pytest.mark.parametrize("size", [1, 2, 3])
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_types_slices_and_settings(self, ranks, runs: Runs, size: int, dtype: str):
        recipe = runs.recipe("layout", changes={"model.dtype": dtype})
        outcome = ranks.must("shards:layout", size, recipe=recipe)
        for found in outcome.values:
            assert found["working"] == {f"torch.{dtype}"}, "zero.Init chose another type"
            assert found["masters"] == {"torch.float32"}
            assert found["accumulation"] == "torch.float32"
            assert all(found["right"].values()), "a rank loaded wrong elements"
            assert set(found["decays"]) == {0.0}
            assert found["clip"] == recipe["optim"]["max_grad_norm"]
            assert found["persistent"] > 0, "the test must cover gathered parameters"
        weights = runs.get("sft", 1).source
        padded = 0
        for name, weight in weights.items():
            spans = [found["lengths"][name] for found in outcome.values]
            assert sum(length for _, length in spans) == weight.numel()
            assert all(a + b == c for (a, b), (c, _) in zip(spans, spans[1:], strict=False))
            padded += weight.numel() % size
        assert size == 1 or padded > 0, "the sizes must force padding"

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_rotary_frequencies_are_those_of_transformers(self, ranks, runs: Runs, dtype: str):
        recipe = runs.recipe("layout", changes={"model.dtype": dtype})
        found = ranks.must("shards:layout", 2, recipe=recipe).value["buffers"]
        plain = AutoModelForCausalLM.from_pretrained(
            runs.world() / "model", dtype=getattr(torch, dtype)
        )
        expected = dict(plain.named_buffers())
        assert {name for name in expected if "inv_freq" in name}
        for name, buffer in expected.items():
            assert found[name].dtype == buffer.dtype == torch.float32, name
            assert torch.equal(found[name], buffer), name

    @pytest.mark.parametrize(("size", "dtype"), [(2, "float32"), (3, "float32"), (2, "bfloat16")])
    def test_padding_is_cleared_and_never_read(self, ranks, runs: Runs, size: int, dtype: str):
        bf16 = dtype == "bfloat16"
        world = runs.world("bf16", dtype=torch.bfloat16) if bf16 else runs.world()
        changes = {"model.dtype": dtype} if bf16 else {}
        recipe = runs.recipe(f"padding-{size}", SSU, changes, world)
        outcome = ranks.must("shards:padding", size, recipe=recipe)
        padding = torch.cat([value["padding"] for value in outcome.values])
        assert padding.numel() > 0
        assert (padding == 0).all()
        losses = [line["loss"] for line in read_lines(world / f"padding-{size}/metrics.jsonl")]
        plain = {"model__dtype": dtype} if bf16 else {}
        assert losses == runs.get("ssu", size, world=world, **plain).losses

    def test_another_precision_than_asked_is_an_error(self, ranks, config):
        found = ranks.must("shards:wrong_precision", 2, config_path=config(False)).values
        for message in found:
            assert "was partitioned as torch.bfloat16, expected torch.float32" in message


class TestEdits:
    @pytest.mark.parametrize("evaluate_first", [False, True])
    @pytest.mark.parametrize(("dtype", "offload"), MODES)
    def test_edited_masters_reach_every_copy(
        self, ranks, runs: Runs, dtype, offload, evaluate_first
    ):
        changes = {"model.dtype": dtype}
        if offload:
            changes["deepspeed"] = str(runs.world() / "zero3_offload.json")
        recipe = runs.recipe("edited", changes=changes)
        outcome = ranks.must(
            "shards:edited_params", 2, recipe=recipe, probe=PROBE, evaluate_first=evaluate_first
        )
        matrices = [n for n in outcome.value["kept"] if n.endswith("_proj.weight")]
        assert bool(matrices) == evaluate_first, "the test must cover gathered matrices"
        kind = getattr(torch, dtype)
        plain = AutoModelForCausalLM.from_pretrained(runs.world() / "model", dtype=torch.float32)
        source = plain.state_dict()
        for name, master in outcome.value["masters"].items():
            wave = 0.01 * torch.sin(torch.arange(master.numel()).float()).view(master.shape)
            start = source[name].to(kind).float()
            assert torch.allclose(master, start + wave, atol=1e-7), name
            assert torch.equal(outcome.value["working"][name], master.to(kind)), name
        edited = AutoModelForCausalLM.from_pretrained(runs.world() / "model", dtype=kind)
        edited.load_state_dict({n: m.to(kind) for n, m in outcome.value["masters"].items()})
        with torch.no_grad():
            expected = edited(torch.tensor(PROBE)).logits.float()
        for value in outcome.values:
            assert torch.allclose(value["logits"], expected, atol=1e-5 if dtype == "float32" else 0)


class TestNotFinite:
    @pytest.mark.parametrize(
        ("where", "offload", "what"),
        [
            ("loss", False, "the loss"),
            ("gradient", False, "the gradient of model.layers.1.mlp.down_proj.weight"),
            ("frozen", False, "the gradient of model.layers.1.mlp.down_proj.weight"),
            ("frozen", True, "the gradient of model.layers.1.mlp.down_proj.weight"),
        ],
    )
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_every_rank_stops_before_a_weight_changes(
        self, ranks, runs: Runs, dtype: str, where: str, offload: bool, what: str
    ):
        name = f"nan-{dtype}-{where}-{offload}"
        method = MASKED if where != "loss" else {"kind": "sft"}
        changes = {"model.dtype": dtype, "guard.max_skips": 1, "guard.max_rollbacks": 0}
        if offload:
            changes["deepspeed"] = str(runs.world() / "zero3_offload.json")
        recipe = runs.recipe(name, method, changes)
        outcome = ranks.must("shards:not_finite", 2, recipe=recipe, where=where, step=3, rank=1)
        for value in outcome.values:
            assert value["changed"] is False
            assert value["error"].startswith(f"step 3: {what} is not finite on rank 1")
            assert "no weight was changed" in value["error"] and "\n" not in value["error"]
        folder = runs.world() / name
        assert [line["step"] for line in read_lines(folder / "metrics.jsonl")] == [1, 2]
        assert [p.name for p in folder.glob("checkpoints/step-*")] == ["step-00000002"]

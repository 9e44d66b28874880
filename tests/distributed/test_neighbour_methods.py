"""O-LoRA, CLoRA and OPLoRA in whole runs: what they promise of the applied update."""

from __future__ import annotations

import hashlib

import pytest
import safetensors.torch
import torch

from forgetscale.ops.neighbours import random_basis
from tests.distributed.compare import assert_same_weights
from tests.distributed.harness import RankServer
from tests.distributed.runs import Run, Runs

LORA = {"kind": "lora", "rank": 3, "alpha": 12}


def deltas(run: Run) -> dict[str, torch.Tensor]:
    factors = run.outcome.value["factors"]
    modules = {name.rpartition(".")[0] for name in factors}
    return {
        m: 4.0 * factors[f"{m}.lora_B"].double() @ factors[f"{m}.lora_A"].double() for m in modules
    }


def test_oplora_leaves_the_leading_triples(runs: Runs):
    run = runs.get({"kind": "oplora", "num_directions": 4}, 2, adapter=LORA)
    plain = runs.get({"kind": "sft"}, 2, adapter=LORA)
    leaks = {"oplora": 0.0, "plain": 0.0}
    for module, delta in deltas(run).items():
        weight = run.source[f"{module}.weight"].double()
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        k = min(4, min(weight.shape) // 2)
        for name, update in (("oplora", delta), ("plain", deltas(plain)[module])):
            inside = torch.cat(
                [(left[:, :k].t() @ update).flatten(), (update @ right[:k].t()).flatten()]
            )
            leaks[name] = max(leaks[name], float(inside.norm() / update.norm()))
        merged = weight + delta
        kept = merged @ right[:k].t() - left[:, :k] * values[:k]
        assert float(kept.norm() / values[:k].norm()) < 1e-5, "the triples are those of the source"
    assert leaks["oplora"] < 1e-5 < 0.05 < leaks["plain"], "the control leaks"
    assert run.losses[-1] < run.losses[0]


@pytest.mark.parametrize("form", ["published", "exact"])
def test_olora_keeps_off_earlier_rows(runs: Runs, form: str):
    first = runs.get({"kind": "sft"}, 1, adapter=LORA)
    earlier = str(first.folder / "export-adapter")
    method = {"kind": "olora", "strength": 5.0, "form": form, "previous": [earlier]}
    one, two = (runs.get(method, size, adapter=LORA, run__seed=9) for size in (1, 2))
    assert_same_weights(two.outcome.value["factors"], one.outcome.value["factors"])
    free = runs.get({"kind": "sft"}, 1, adapter=LORA, run__seed=9)
    stored = safetensors.torch.load_file(
        first.folder / "export-adapter" / "adapter_model.safetensors"
    )

    def overlap(run: Run) -> float:
        total = 0.0
        for key, rows in stored.items():
            if ".lora_A." in key:
                name = key.removeprefix("base_model.model.").removesuffix(".weight")
                total += float((rows @ run.outcome.value["factors"][name].t()).abs().sum())
        return total

    assert overlap(one) < 0.8 * overlap(free)
    assert one.metrics[0]["method/penalty"] > 0


def test_clora_penalty_is_that_of_fixed_directions(ranks: RankServer, runs: Runs):
    method = {"kind": "clora", "strength": 2.0, "num_directions": 3}
    run = runs.get(method, 2, adapter=LORA)
    recipe = runs.recipe("clora-start", method, {"adapter": LORA})
    start = ranks.must("adapters:start", 1, recipe=recipe).value
    expected = 0.0
    for name, value in start.items():
        factor = (value.t() if name.endswith("lora_A") else value).double()
        digest = hashlib.sha256(f"clora/3/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        basis = random_basis(factor.shape[0], 3, generator)
        expected += 2.0 * float((basis.t() @ factor).square().sum())
    assert run.metrics[0]["method/penalty"] == pytest.approx(expected, rel=1e-5)
    assert run.metrics[-1]["method/penalty"] < expected


def test_another_models_adapter_is_refused(ranks: RankServer, runs: Runs, tmp_path):
    safetensors.torch.save_file(
        {"base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": torch.ones(2, 7)},
        tmp_path / "adapter_model.safetensors",
    )
    method = {"kind": "olora", "previous": [str(tmp_path)]}
    recipe = runs.recipe("olora-wrong", method, {"adapter": LORA})
    outcome = ranks.run("training:command", 1, recipe=recipe)
    assert outcome.codes == [2] and "with 7 inputs, the model has 35" in outcome.logs[0]

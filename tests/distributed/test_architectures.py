"""Other architectures of transformers: the first step, frozen bits, exports."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.distributed import tiny
from tests.distributed.runs import PROBE, SSU, Runs


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_masked_training(runs: Runs, name: str, tied: bool):
    world = runs.world(f"{name}-{tied}", architecture=getattr(tiny, name), tied=tied)
    one, run = (runs.get(SSU, size, world=world) for size in (1, 2))
    assert run.losses == pytest.approx(one.losses, rel=2e-6)

    plain = AutoModelForCausalLM.from_pretrained(world / "model", dtype=torch.float32)
    ids = torch.from_numpy(tiny.set_rows(rows=40, seed=1)).long()[run.rows[0]]
    with torch.no_grad():
        first = plain(ids, labels=ids).loss
    assert run.losses[0] == pytest.approx(float(first), rel=1e-5)
    assert run.losses[-1] < run.losses[0]

    vectors = {n for n, w in run.source.items() if w.dim() == 1}
    assert any(n.endswith(".bias") for n in vectors) == (name == "qwen2")
    for key, frozen in run.frozen.items():
        assert torch.equal(run.export[key][frozen], run.source[key][frozen]), key
        body = "embed_tokens" not in key and "lm_head" not in key
        if body:
            share = run.source[key].shape[-1] // 2 / run.source[key].shape[-1]
            assert float(frozen.float().mean()) == pytest.approx(share), key

    exported = AutoModelForCausalLM.from_pretrained(run.folder / "export", dtype=torch.float32)
    with torch.no_grad():
        logits = exported(torch.tensor(PROBE)).logits
    assert torch.allclose(logits, run.outcome.value["logits"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_half_fine_tuning(runs: Runs, name: str):
    world = runs.world(f"{name}-False", architecture=getattr(tiny, name))
    run = runs.get("hft", 2, world=world)
    assert all(torch.equal(run.export[key], run.source[key]) for key in run.whole)
    norms = [key for key in run.whole if key.endswith("layernorm.weight")]
    assert len(norms) == 2, "one of the two norms of each layer"

"""Bytes of anchors and Fisher bases at the shapes of an 8B and a 70B model."""

from __future__ import annotations

import pytest
from transformers import LlamaConfig

from forgetscale.config import Recipe, validate_recipe
from forgetscale.engine.memory.protection import basis_bytes, body_matrices, protection_bytes
from forgetscale.models import build_skeleton, parameter_shapes
from tests.distributed.harness import ROOT

LLAMA_8B = LlamaConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128_256,
)
LLAMA_70B = LlamaConfig(
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    vocab_size=128_256,
)


@pytest.fixture(scope="module")
def structure():
    return build_skeleton(LLAMA_8B)


@pytest.mark.parametrize(
    ("names", "entries", "diagonal", "vector", "sides"),
    [
        # Of the note's table: entries, fp32 diagonal, vectors of rank 16, 64 directions a side.
        (("q_proj", "v_proj"), 0.671e9, 2.7e9, 42.9e9, 0.11e9),
        (None, 6.979e9, 27.9e9, 446.7e9, 0.67e9),
    ],
)
def test_sizes_at_8b(structure, names, entries, diagonal, vector, sides):
    matrices = body_matrices(structure, names)
    assert sum(h * w for h, w in matrices.values()) == pytest.approx(entries, rel=1e-3)
    assert basis_bytes(matrices, "diagonal", 1) == pytest.approx(diagonal, rel=1e-2)
    assert basis_bytes(matrices, "vector", 16) == pytest.approx(vector, rel=2e-3)
    both = sum(basis_bytes(matrices, side, 64) for side in ("left", "right"))
    assert both == pytest.approx(sides, rel=2e-2)
    # What is as long as a weight is shared by ranks; 3 to 5 rows more of a left side.
    assert basis_bytes(matrices, "vector", 16, 8) == pytest.approx(vector / 8, rel=2e-3)
    left = basis_bytes(matrices, "left", 64)
    assert left / 8 < basis_bytes(matrices, "left", 64, 8) < left / 7


def recipe_of(method: dict) -> Recipe:
    return validate_recipe(
        {
            "run": {"name": "x", "output_dir": "x"},
            "model": {"path": "x", "dtype": "bfloat16"},
            "data": {"path": "x"},
            "method": method,
            "train": {"num_steps": 1},
            "deepspeed": str(ROOT / "ds_configs" / "zero3.json"),
        }
    )


def kept(structure, method: dict, world_size: int):
    recipe = recipe_of(method)
    return protection_bytes(recipe, structure, parameter_shapes(structure), world_size)


def test_methods_at_8b(structure):
    full = sum(p.numel() for p in structure.parameters())
    found = kept(structure, {"kind": "l2_sp"}, 8)
    assert found.anchors == pytest.approx(2 * full / 8, rel=1e-4) and found.basis == 0
    found = kept(structure, {"kind": "ewc", "basis": "x"}, 8)
    assert found.basis == pytest.approx(2 * found.anchors, rel=1e-6)
    assert found.disk == pytest.approx(4 * full, rel=1e-6)
    found = kept(structure, {"kind": "alignguard", "basis": "x"}, 8)
    assert found.anchors == pytest.approx(2 * 6.979e9 / 8, rel=1e-3)
    assert found.basis < 0.03e9 < found.disk < 0.2e9
    found = kept(structure, {"kind": "osf", "rank": 64}, 8)
    assert found.disk == 0 and 0.3e9 < found.basis < 0.45e9
    assert kept(structure, {"kind": "sft"}, 8).anchors == 0


def test_alignguard_at_70b_is_the_anchor():
    structure = build_skeleton(LLAMA_70B)
    found = kept(structure, {"kind": "alignguard", "basis": "x"}, 64)
    assert found.anchors == pytest.approx(2 * 68.5e9 / 64, rel=1e-2)
    assert found.basis < 0.01 * found.anchors

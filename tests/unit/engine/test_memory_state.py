"""Bytes that last: the published shapes of OLMo 2 7B and 13B on one card, and cuts by hand."""

from __future__ import annotations

import math

import pytest
import torch

from forgetscale.config import Recipe, validate_recipe
from forgetscale.engine.memory import copy_bytes, state_bytes
from forgetscale.engine.memory.state import sub_groups
from forgetscale.masks import FreezePlan, compact_layout
from tests.distributed.harness import ROOT

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def recipe(dtype: str, accumulation: str, deepspeed: str = "zero3", **train: str) -> Recipe:
    return validate_recipe(
        {
            "run": {"name": "x", "output_dir": "x"},
            "model": {"path": "x", "dtype": dtype},
            "data": {"path": "x"},
            "method": {"kind": "sft"},
            "train": {"num_steps": 1, "accumulation_dtype": accumulation, **train},
            "deepspeed": str(ROOT / "ds_configs" / f"{deepspeed}.json"),
        }
    )


def olmo2(hidden: int, inner: int, layers: int, vocab: int = 100_352) -> dict[str, tuple[int, ...]]:
    """Return the shapes of OLMo 2, written down by hand."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for name in ATTENTION:
            shapes[f"{prefix}.self_attn.{name}.weight"] = (hidden, hidden)
        for name in ("q_norm", "k_norm"):
            shapes[f"{prefix}.self_attn.{name}.weight"] = (hidden,)
        for name in ("gate_proj", "up_proj"):
            shapes[f"{prefix}.mlp.{name}.weight"] = (inner, hidden)
        shapes[f"{prefix}.mlp.down_proj.weight"] = (hidden, inner)
        for name in ("post_attention_layernorm", "post_feedforward_layernorm"):
            shapes[f"{prefix}.{name}.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def half_of_the_columns(shapes):
    """Half of the columns of body matrices; vectors keep all states under a mask."""
    body = [n for n, s in shapes.items() if len(s) == 2 and ".layers." in n]
    plan = FreezePlan(columns={n: torch.arange(shapes[n][1] // 2) for n in body})
    return compact_layout(plan, shapes, body, [])


SEVEN = ("7b", olmo2(4096, 11008, 32), 7_298_617_344, 3_238_266_880)
THIRTEEN = ("13b", olmo2(5120, 13824, 40), 13_716_198_400, 6_344_296_960)


@pytest.mark.parametrize("case", [SEVEN, THIRTEEN], ids=lambda case: case[0])
def test_counts_of_the_published_models(case):
    _, shapes, total, frozen = case
    assert sum(map(math.prod, shapes.values())) == total
    pieces = half_of_the_columns(shapes).pieces.values()
    in_matrices = sum(math.prod(p.stored_shape) for p in pieces if not p.trainable)
    # The published count includes half of each norm gain, which the layout leaves under a mask.
    in_gains = sum(shape[0] // 2 for shape in shapes.values() if len(shape) == 1)
    assert in_matrices + in_gains == frozen


@pytest.mark.parametrize(
    "case, layout, accumulation, gigabytes",
    [
        (SEVEN, "compact", "bfloat16", 71.4),
        (SEVEN, "compact", "float32", 79.6),
        (SEVEN, "full", "bfloat16", 116.8),
        (SEVEN, "full", "float32", 131.4),
        (THIRTEEN, "compact", "bfloat16", 130.6),
        (THIRTEEN, "compact", "float32", 145.4),
        (THIRTEEN, "full", "bfloat16", 219.5),
        (THIRTEEN, "full", "float32", 246.9),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else str(value),
)
def test_state_on_one_card(case, layout, accumulation, gigabytes):
    # 2 bytes an element for bf16 weights; 4 for a master, 8 for moments and 2 or 4 for the
    # gradient of each trained one. No gather buffers, no activations.
    shapes = case[1]
    cut = half_of_the_columns(shapes) if layout == "compact" else None
    found = state_bytes(recipe("bfloat16", accumulation), shapes, cut, 1)
    assert round(found.device / 1e9, 1) == gigabytes
    assert found.host == 0


def test_the_13b_state_fits_one_141_gb_card_only_when_compact():
    card = 150.7e9
    shapes = THIRTEEN[1]
    compact, full = (
        state_bytes(recipe("bfloat16", "bfloat16"), shapes, layout, 1).device
        for layout in (half_of_the_columns(shapes), None)
    )
    assert compact < card < full


def test_a_masked_plan_saves_nothing_and_a_whole_frozen_matrix_all_but_its_weights():
    from forgetscale.masks import CompactLayout

    shapes = {"a.weight": (3, 5), "b.weight": (4, 5)}
    masked = CompactLayout({}, FreezePlan(columns={"a.weight": torch.tensor([0, 3])}))
    frozen = CompactLayout({}, FreezePlan(whole=frozenset({"a.weight"})))
    setting = recipe("float32", "float32")
    full = state_bytes(setting, shapes, None, 1)
    assert state_bytes(setting, shapes, masked, 1) == full
    found = state_bytes(setting, shapes, frozen, 1)
    assert (found.weights, found.masters, found.moments) == (4 * 35, 4 * 20, 8 * 20)


def test_padding_counts_on_every_rank():
    found = state_bytes(recipe("float32", "float32"), {"a": (7,), "b": (1,)}, None, 3)
    assert found.weights == 4 * (3 + 1)


def test_offload_moves_all_but_the_weights_to_the_host():
    found = state_bytes(recipe("bfloat16", "float32", "zero3_offload"), {"a": (10,)}, None, 1)
    assert found.device == 20
    # masters 4, moments 8, accumulated gradients 4, gradients to step with 4
    assert found.host == 10 * 20


def test_copies_for_checkpoints_are_12_bytes_a_trained_element():
    setting = recipe("bfloat16", "float32")
    for shapes, layout in ((SEVEN[1], None), (SEVEN[1], half_of_the_columns(SEVEN[1]))):
        state = state_bytes(setting, shapes, layout, 8)
        found = copy_bytes(setting, shapes, layout, 8, locked=False)
        assert found == state.masters + state.moments
    assert round(copy_bytes(setting, SEVEN[1], None, 1, locked=False) / 1e9, 1) == 87.6
    # In powers of two: 12 bytes become 16, 4 stay 4; of master and two moments each.
    assert copy_bytes(setting, {"a": (7,), "b": (1,)}, None, 3, locked=True) == 3 * (16 + 4)
    waiting = recipe("bfloat16", "float32", checkpoint_mode="sync")
    assert copy_bytes(waiting, SEVEN[1], None, 1, locked=True) == 0


@pytest.mark.parametrize(
    "slices, limit, expected",
    [
        ([3, 3, 3], 100, [9]),
        ([3, 3, 3], 4, [6, 3]),
        ([5, 1], 4, [5, 1]),
        ([], 4, []),
        ([4], 4, [4]),
    ],
)
def test_groups_close_with_the_slice_that_reaches_the_limit(slices, limit, expected):
    assert sub_groups(slices, limit) == expected

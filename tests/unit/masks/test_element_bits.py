"""Bits of single elements: packing by slices, and their effect on slices."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from forgetscale.masks import ElementMask, FreezePlan, count_bits, pack_slice, unpack_bits
from forgetscale.masks import bits as module


def slices(numel: int, world: int) -> list[tuple[int, int]]:
    part = -(-numel // world)
    starts = [min(rank * part, numel) for rank in range(world)]
    return [(start, min(start + part, numel)) for start in starts]


@st.composite
def frozen_and_world(draw):
    frozen = draw(st.lists(st.booleans(), min_size=1, max_size=90))
    return torch.tensor(frozen), draw(st.integers(1, 17))


def packed(frozen: torch.Tensor, world: int) -> torch.Tensor:
    numel = frozen.numel()
    parts = [pack_slice(frozen[low:high], low, numel) for low, high in slices(numel, world)]
    return torch.stack(parts).sum(0, dtype=torch.uint8)


@given(frozen_and_world())
def test_slices_add_up_to_the_bits_of_the_tensor(case):
    frozen, world = case
    bits = packed(frozen, world)
    assert bits.numel() == -(-frozen.numel() // 8)
    assert torch.equal(bits, packed(frozen, 1))
    expected = [
        sum(int(bit) << place for place, bit in enumerate(frozen[first : first + 8]))
        for first in range(0, frozen.numel(), 8)
    ]
    assert bits.tolist() == expected
    assert torch.equal(unpack_bits(bits, 0, frozen.numel()), frozen)
    assert count_bits(bits) == int(frozen.sum())


@given(frozen_and_world())
def test_effect_on_slices_equals_a_full_mask(case):
    frozen, world = case
    plan = FreezePlan(elements={"w": packed(frozen, 1)})
    weight = torch.randn(frozen.numel())
    grads, decayed, kept, count = [], [], [], 0
    for low, high in slices(frozen.numel(), world):
        mask = plan.slice_mask("w", (frozen.numel(),), low, high - low)
        assert isinstance(mask, ElementMask)
        grad, param = weight[low:high].clone(), weight[low:high].clone()
        mask.zero_frozen_(grad)
        mask.decay_(param, 0.125)
        grads.append(grad)
        decayed.append(param)
        kept.append(mask.frozen_elements(weight[low:high]))
        count += mask.num_frozen()
    assert torch.equal(torch.cat(grads), torch.where(frozen, 0.0, weight))
    assert torch.equal(torch.cat(decayed), torch.where(frozen, weight, weight * (1 - 0.125)))
    assert torch.equal(torch.cat(kept), weight[frozen])
    assert count == int(frozen.sum()) == plan.num_frozen({"w": (frozen.numel(),)})


def test_long_slices_go_in_parts(monkeypatch):
    monkeypatch.setattr(module, "CHUNK_BYTES", 5)
    frozen = torch.rand(1003, generator=torch.Generator().manual_seed(1)) < 0.4
    bits = packed(frozen, 3)
    mask = ElementMask.build(13, 900, bits)
    grad = torch.ones(900)
    mask.zero_frozen_(grad)
    assert torch.equal(grad, (~frozen[13:913]).float())
    assert count_bits(bits) == int(frozen.sum())


def test_nan_in_a_frozen_place_stays():
    mask = ElementMask.build(0, 3, pack_slice(torch.tensor([True, False, True]), 0, 3))
    grad = torch.tensor([float("nan"), 1.0, 2.0])
    mask.zero_frozen_(grad)
    assert torch.isnan(grad[0]) and grad[1:].tolist() == [1.0, 0.0]


def test_no_decay_touches_nothing():
    mask = ElementMask.build(0, 2, pack_slice(torch.tensor([True, False]), 0, 2))
    param = torch.tensor([float("nan"), 1.0])
    mask.decay_(param, 0.0)
    assert param[1] == 1.0


def test_one_bit_an_element_and_a_view_of_the_plan():
    bits = torch.zeros(1_000_000 // 8, dtype=torch.uint8)
    mask = FreezePlan(elements={"w": bits}).slice_mask("w", (1000, 1000), 400_003, 100_000)
    assert isinstance(mask, ElementMask) and mask.bits.numel() <= 12_502
    storage = mask.bits.untyped_storage()
    assert storage.data_ptr() == bits.untyped_storage().data_ptr(), "a rank maps, it does not copy"
    mask.zero_frozen_(torch.ones(100_000))
    assert not mask._copies

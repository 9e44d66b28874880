"""Freeze masks on slices against full-size masks, for every shape and every cut."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from forgetscale.masks import (
    FreezePlan,
    SliceMask,
    by_column,
    column_power_sums,
    row_power_sums,
    split_rows,
)

CPU = torch.device("cpu")


@st.composite
def cuts(draw):
    """Return shape, world size, frozen columns, frozen rows: anything small."""
    vector = draw(st.booleans())
    width = draw(st.integers(1, 9))
    height = 1 if vector else draw(st.integers(1, 7))
    columns = draw(st.one_of(st.none(), st.sets(st.integers(0, width - 1))))
    rows = draw(st.one_of(st.none(), st.sets(st.integers(0, height - 1))))
    return (width,) if vector else (height, width), draw(st.integers(1, 8)), columns, rows


def index(values: set[int] | None) -> torch.Tensor | None:
    return None if values is None else torch.tensor(sorted(values), dtype=torch.int64)


def slices(numel: int, world: int) -> list[tuple[int, int]]:
    """Return start and length of each rank's part, as ZeRO-3 cuts a parameter."""
    part = -(-numel // world)
    starts = [min(rank * part, numel) for rank in range(world)]
    return [(start, min(part, numel - start)) for start in starts]


def dense_frozen(shape, columns, rows) -> torch.Tensor:
    mask = torch.zeros(shape, dtype=torch.bool)
    matrix = mask.view(-1, shape[-1])
    matrix[:, sorted(columns or ())] = True
    matrix[sorted(rows or ())] = True
    return mask.flatten()


def mask_of(shape, start, length, columns, rows) -> SliceMask:
    return SliceMask.build(start, length, shape[-1], index(columns), index(rows))


@given(cuts())
@example(((1,), 3, {0}, None))
@example(((5, 3), 4, {0, 2}, {1, 4}))
def test_gradient_and_decay_equal_a_full_mask(case):
    shape, world, columns, rows = case
    numel = torch.Size(shape).numel()
    frozen = dense_frozen(shape, columns, rows)
    grad = torch.randn(numel) + 3
    weight = torch.randn(numel)
    masked, decayed = [], []
    for start, length in slices(numel, world):
        mask = mask_of(shape, start, length, columns, rows)
        part = grad[start : start + length].clone()
        mask.zero_frozen_(part)
        masked.append(part)
        part = weight[start : start + length].clone()
        mask.decay_(part, 0.125)
        decayed.append(part)
    assert torch.equal(torch.cat(masked), torch.where(frozen, 0.0, grad))
    assert torch.equal(torch.cat(decayed), torch.where(frozen, weight, weight * (1 - 0.125)))


@given(cuts())
def test_frozen_elements_are_all_of_them_and_no_others(case):
    shape, world, columns, rows = case
    numel = torch.Size(shape).numel()
    positions = torch.arange(numel)
    found: list[int] = []
    for start, length in slices(numel, world):
        mask = mask_of(shape, start, length, columns, rows)
        part = mask.frozen_elements(positions[start : start + length])
        assert part.numel() == mask.num_frozen()
        found += part.tolist()
    expected = dense_frozen(shape, columns, rows).nonzero().flatten().tolist()
    assert sorted(set(found)) == expected


@given(cuts(), st.sampled_from([1, 2]))
def test_column_sums_add_up_over_slices(case, power: int):
    shape, world, _, _ = case
    numel = torch.Size(shape).numel()
    weight = torch.randn(numel)
    total = sum(
        column_power_sums(weight[start : start + length], start, shape[-1], power)
        for start, length in slices(numel, world)
    )
    expected = weight.double().view(-1, shape[-1]).abs().pow(power).sum(0)
    assert total.dtype == torch.float64
    assert torch.allclose(total, expected, rtol=1e-12)


@given(cuts(), st.sampled_from([1, 2]), st.booleans())
def test_row_sums_add_up_over_slices(case, power: int, weighted: bool):
    shape, world, _, _ = case
    numel, width = torch.Size(shape).numel(), shape[-1]
    weight, factors = torch.randn(numel), torch.rand(width, dtype=torch.float64)
    total = sum(
        row_power_sums(
            weight[start : start + length],
            start,
            width,
            numel // width,
            power,
            factors if weighted else None,
        )
        for start, length in slices(numel, world)
    )
    matrix = weight.double().view(-1, width).abs()
    expected = ((matrix * factors) if weighted else matrix).pow(power).sum(1)
    assert total.dtype == torch.float64
    assert torch.allclose(total, expected, rtol=1e-12)


@given(cuts())
def test_each_element_gets_the_value_of_its_column(case):
    shape, world, _, _ = case
    numel = torch.Size(shape).numel()
    vector = torch.randn(shape[-1])
    parts = [by_column(vector, start, length) for start, length in slices(numel, world)]
    assert torch.equal(torch.cat(parts), vector.repeat(numel // shape[-1]))


@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 11))
def test_split_rows(start: int, length: int, width: int):
    head, body = split_rows(start, length, width)
    assert 0 <= head <= length and body % width == 0 and head + body <= length
    assert head == length or (start + head) % width == 0
    assert length - head - body < width


def test_power_is_checked():
    with pytest.raises(ValueError, match="power must be 1 or 2, got 3"):
        column_power_sums(torch.ones(4), 0, 2, 3)
    with pytest.raises(ValueError, match="power must be 1 or 2, got 0"):
        row_power_sums(torch.ones(4), 0, 2, 2, 0)


class TestNotFinite:
    @pytest.mark.parametrize("columns", [{1}, None])
    def test_nan_in_a_frozen_place_stays(self, columns):
        rows = None if columns else {0}
        mask = mask_of((2, 3), 0, 6, columns, rows)
        grad = torch.zeros(6)
        grad[1] = float("nan")
        mask.zero_frozen_(grad)
        assert torch.isnan(grad[1]), "a NaN that is overwritten would never be noticed"


class TestWorkedOptimizer:
    """The numbers of two AdamW steps on a 2 x 3 matrix with column 1 frozen."""

    weight = ((1.0, 2, 3), (4, 5, 6))
    grad = ((1.0, 1, -2), (0.5, 1, 2))

    def run(self, *, ours: float, theirs: float = 0.0, masked=(True, True)) -> torch.Tensor:
        param = torch.nn.Parameter(torch.tensor(self.weight).flatten())
        optimizer = torch.optim.AdamW([param], lr=0.1, weight_decay=theirs)
        mask = mask_of((2, 3), 0, 6, {1}, None)
        for use in masked:
            param.grad = torch.tensor(self.grad).flatten()
            if use:
                mask.zero_frozen_(param.grad)
                mask.decay_(param.data, 0.1 * ours)
            optimizer.step()
        return param.detach().view(2, 3)

    def test_without_decay(self):
        found = self.run(ours=0.0)
        expected = torch.tensor([[0.8, 2, 3.2], [3.8, 5, 5.8]])
        assert torch.allclose(found, expected, atol=1e-6)
        assert found[:, 1].tolist() == [2.0, 5.0]

    def test_masked_decay_leaves_frozen_bits_and_equals_adamw_elsewhere(self):
        found = self.run(ours=0.01)
        adamw = self.run(ours=0.0, theirs=0.01)
        assert found[:, 1].tolist() == [2.0, 5.0]
        assert torch.equal(found[:, [0, 2]], adamw[:, [0, 2]])

    def test_the_failure_to_forbid(self):
        # A zero gradient is not a frozen weight: AdamW's own decay moves it.
        found = self.run(ours=0.0, theirs=0.01)
        assert found[:, 1].tolist() == pytest.approx([1.996002, 4.990005], abs=1e-6)

    def test_momentum_leak_of_a_late_mask(self):
        first = self.run(ours=0.0, masked=(False,))
        assert first[:, 1].tolist() == pytest.approx([1.9, 4.9], abs=1e-6)
        found = self.run(ours=0.0, masked=(False, True))
        assert found[:, 1].tolist() == pytest.approx([1.832994, 4.832994], abs=1e-6)


def test_clipping_norm_counts_what_may_move():
    grad = torch.tensor([3.0, 4, 0, 0, 0, 12])
    assert grad.norm() == 13
    mask_of((2, 3), 0, 6, {1}, None).zero_frozen_(grad)
    assert grad.norm().item() == pytest.approx(12.369317, abs=1e-6)


def test_output_drift_depends_on_moving_columns_only():
    update = torch.tensor([[0.5, 0, -1], [1, 0, 2]])
    for frozen_input in (7.0, -1e3, 0.0):
        assert (update @ torch.tensor([2.0, frozen_input, 1])).tolist() == [0, 4]
    weight = torch.randn(2, 3)
    moved = weight + update
    only_frozen = torch.tensor([0.0, 0.7, 0])
    assert torch.equal(moved @ only_frozen, weight @ only_frozen)


def test_no_mask_of_full_size_is_kept():
    plan = FreezePlan(columns={"w": torch.arange(0, 1000, 2)})
    mask = plan.slice_mask("w", (5000, 1000), 0, 5_000_000)
    assert mask is not None
    mask.zero_frozen_(torch.ones(5_000_000))
    kept = [t for t in (mask.columns, mask.rows, *mask._keep.values()) if t is not None]
    assert sum(t.numel() for t in kept) <= 2000


def test_many_rows_cost_three_operations_and_a_vector():
    # 90 % of a large vocabulary may be shielded; a loop over rows would take seconds a step.
    rows = torch.arange(100_000)[torch.arange(100_000) % 10 > 0]
    plan = FreezePlan(rows={"w": rows})
    start, length = 123_457, 500_003
    mask = plan.slice_mask("w", (100_000, 7), start, length)
    assert mask is not None
    grad = torch.ones(length)
    assert len(list(mask._pieces(grad))) == 3
    mask.zero_frozen_(grad)
    row = torch.arange(start, start + length) // 7
    assert torch.equal(grad, (row % 10 == 0).float())
    param = torch.full((length,), 3.0)
    mask.decay_(param, 0.25)
    assert torch.equal(param, torch.where(row % 10 == 0, 2.25, 3.0))
    assert mask.num_frozen() == int((row % 10 > 0).sum())
    assert all(keep.numel() <= length // 7 + 2 for keep in mask._keep.values())

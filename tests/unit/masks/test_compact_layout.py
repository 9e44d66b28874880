"""Cutting matrices into frozen and trainable parts loses and moves nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from forgetscale.masks import FreezePlan, Piece, compact_layout

SHAPES = {"a.weight": (5, 7), "b.weight": (4, 6), "e.weight": (9, 3), "n.weight": (7,)}


def plan_of(**parts) -> FreezePlan:
    return FreezePlan(**parts)


def test_columns_are_cut_and_vectors_keep_their_mask():
    plan = plan_of(columns={"a.weight": torch.tensor([1, 4]), "n.weight": torch.tensor([0, 2])})
    layout = compact_layout(plan, SHAPES, ["a.weight", "b.weight"], [])
    assert set(layout.pieces) == {"a.frozen", "a.trainable"}
    assert layout.pieces["a.frozen"].index.tolist() == [1, 4]
    assert layout.pieces["a.trainable"].index.tolist() == [0, 2, 3, 5, 6]
    assert layout.pieces["a.trainable"].stored_shape == (5, 5)
    assert set(layout.plan.columns) == {"n.weight"}
    assert layout.plan.whole == {"a.frozen"}
    assert layout.matrix_of("a.trainable") == "a.weight"
    assert layout.matrix_of("n.weight") == "n.weight"
    assert layout.matrices() == {"a.weight": ("a.frozen", "a.trainable")}


def test_rows_are_cut():
    plan = plan_of(rows={"e.weight": torch.tensor([0, 8]), "a.weight": torch.tensor([2])})
    layout = compact_layout(plan, SHAPES, [], ["e.weight", "a.weight"])
    assert layout.pieces["e.trainable"].index.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert layout.pieces["e.frozen"].stored_shape == (2, 3)
    assert layout.pieces["a.frozen"].stored_shape == (1, 7)
    assert not layout.plan.rows


@pytest.mark.parametrize(
    "plan",
    [
        plan_of(columns={"a.weight": torch.arange(0)}),
        plan_of(columns={"a.weight": torch.arange(7)}),
        plan_of(columns={"a.weight": torch.tensor([1])}, rows={"a.weight": torch.tensor([1])}),
        plan_of(columns={"a.weight": torch.tensor([1])}, whole=frozenset({"a.weight"})),
        plan_of(whole=frozenset({"a.weight"})),
        plan_of(),
    ],
    ids=["none", "all", "both ways", "whole too", "whole", "empty"],
)
def test_what_cannot_be_cut_keeps_its_mask(plan: FreezePlan):
    layout = compact_layout(plan, SHAPES, ["a.weight"], ["a.weight"])
    assert not layout.pieces
    assert layout.plan.content_hash() == plan.content_hash()


def test_a_matrix_outside_the_lists_keeps_its_mask():
    plan = plan_of(columns={"a.weight": torch.tensor([1])})
    layout = compact_layout(plan, SHAPES, ["b.weight"], ["a.weight"])
    assert not layout.pieces and set(layout.plan.columns) == {"a.weight"}


@given(st.data())
def test_parts_give_the_whole_back(data):
    height, width = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    axis = data.draw(st.sampled_from(["column", "row"]))
    size = width if axis == "column" else height
    chosen = sorted(data.draw(st.sets(st.integers(0, size - 1))))
    rest = [i for i in range(size) if i not in chosen]
    whole = torch.arange(height * width, dtype=torch.float32).view(height, width)
    built = torch.full_like(whole, -1)
    for index in (chosen, rest):
        piece = Piece("m", (height, width), axis, torch.tensor(index, dtype=torch.int64), True)
        part = piece.take(whole)
        assert tuple(part.shape) == piece.stored_shape
        piece.put_(built, part)
        length = part.numel()
        start = data.draw(st.integers(0, length))
        count = data.draw(st.integers(0, length - start))
        found = piece.take_slice(whole, start, count)
        assert torch.equal(found, part.reshape(-1)[start : start + count])
    assert torch.equal(built, whole)

"""Exact thresholds on slices against a full sort, with ties, for any cut."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from forgetscale.masks import Cut, Segment, find_cuts, order_keys
from forgetscale.masks import threshold as module

INF = math.inf


def in_step(parts: int, work: Callable[[int, Callable[[Tensor], Tensor]], Any]) -> list[Any]:
    """Run ``work(rank, all_reduce)`` on ``parts`` threads that meet in every sum."""
    barrier = threading.Barrier(parts, timeout=60)
    box: list[Any] = [None] * parts
    results: list[Any] = [None] * parts

    def one(rank: int) -> None:
        def all_reduce(value: Tensor) -> Tensor:
            box[rank] = value.clone()
            barrier.wait()
            total = torch.stack(list(box)).sum(0, dtype=value.dtype)
            barrier.wait()
            return total

        try:
            results[rank] = work(rank, all_reduce)
        except ValueError as error:
            results[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(parts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def slices(numel: int, world: int) -> list[tuple[int, int]]:
    part = -(-numel // world)
    starts = [min(rank * part, numel) for rank in range(world)]
    return [(start, min(start + part, numel)) for start in starts]


def largest(scores: Tensor, count: int) -> Tensor:
    """The choice by a full sort: highest first, equal ones by position."""
    order = torch.argsort(scores + 0, descending=True, stable=True)
    found = torch.zeros(scores.numel(), dtype=torch.bool)
    found[order[:count]] = True
    return found


def choose(tensors: list[Tensor], counts: list[int], world: int, *, shared: bool) -> list[Tensor]:
    """Choose on ``world`` ranks; ``shared`` ranks all tensors in one group."""
    offsets = [sum(t.numel() for t in tensors[:i]) if shared else 0 for i in range(len(tensors))]

    def work(rank: int, all_reduce: Callable[[Tensor], Tensor]) -> list[Tensor]:
        mine = [slices(t.numel(), world)[rank] for t in tensors]
        segments = [
            Segment(
                0 if shared else i,
                offsets[i] + low,
                lambda i=i, low=low, high=high: tensors[i][low:high],
            )
            for i, (low, high) in enumerate(mine)
        ]
        cuts = find_cuts(segments, counts, all_reduce)
        return [cuts[segment.group].chosen(segment.scores(), segment.start) for segment in segments]

    parts = in_step(world, work)
    return [torch.cat([part[i] for part in parts]) for i in range(len(tensors))]


VALUES = {
    "few": st.sampled_from([-1.0, -0.0, 0.0, 0.5, 1.0]),
    "wide": st.floats(width=32, allow_nan=False),
    "close": st.sampled_from([1.0 + k * 2.0**-23 for k in range(6)]),
}


@st.composite
def cases(draw):
    kind = draw(st.sampled_from(sorted(VALUES)))
    tensors = [
        torch.tensor(draw(st.lists(VALUES[kind], min_size=1, max_size=40)), dtype=torch.float32)
        for _ in range(draw(st.integers(1, 3)))
    ]
    counts = [draw(st.integers(0, t.numel())) for t in tensors]
    return tensors, counts, draw(st.integers(1, 17))


@settings(max_examples=40)
@given(cases())
@example(([torch.zeros(40)], [13], 17))
@example(([torch.tensor([INF, -INF, 0.0, INF])], [2], 2))
@example(([torch.tensor([-0.0, 0.0])], [1], 2))
def test_each_tensor_alone_equals_a_full_sort(case):
    tensors, counts, world = case
    found = choose(tensors, counts, world, shared=False)
    for scores, count, chosen in zip(tensors, counts, found, strict=True):
        assert torch.equal(chosen, largest(scores, count))


@settings(max_examples=40)
@given(cases())
def test_all_tensors_together_equal_a_full_sort_in_their_order(case):
    tensors, counts, world = case
    count = sum(counts)
    found = torch.cat(choose(tensors, [count], world, shared=True))
    assert int(found.sum()) == count
    assert torch.equal(found, largest(torch.cat(tensors), count))


@pytest.mark.parametrize("world", [1, 5])
def test_many_random_scores_in_parts_of_a_pass(monkeypatch, world: int):
    monkeypatch.setattr(module, "CHUNK", 777)
    generator = torch.Generator().manual_seed(5)
    scores = torch.randn(20_000, generator=generator)
    scores[::3] = scores[0]
    for count in (1, 4_000, 12_345, 19_999):
        (found,) = choose([scores], [count], world, shared=False)
        assert torch.equal(found, largest(scores, count))


def test_positions_beyond_32_bits_decide_ties():
    far = 1 << 40
    segments = [Segment(0, start, lambda: torch.ones(4)) for start in (far, far + 4, 12)]
    (cut,) = find_cuts(segments, [6], lambda value: value)
    assert cut.end == far + 2
    kept = [cut.chosen(torch.ones(4), segment.start).tolist() for segment in segments]
    assert kept == [[True, True, False, False], [False] * 4, [True] * 4]


def test_integer_keys_pass_as_they_are():
    keys = torch.tensor([5, -7, 5, 0], dtype=torch.int32)
    (cut,) = find_cuts([Segment(0, 0, lambda: keys)], [1], lambda value: value)
    assert cut.chosen(keys, 0).tolist() == [True, False, False, False]
    with pytest.raises(ValueError, match="float32 or int32, got torch.float64"):
        order_keys(torch.ones(2, dtype=torch.float64))


def test_worked_ties_of_a_gradient():
    # |g| = 1, 1, 0.5, 1 and half of them: the published rule keeps three, the exact one two.
    scores = torch.tensor([1.0, 1.0, 0.5, 1.0])
    (cut,) = find_cuts([Segment(0, 0, lambda: scores)], [2], lambda value: value)
    assert cut.chosen(scores, 0).tolist() == [True, True, False, False]
    assert cut.with_ties.chosen(scores, 0).tolist() == [True, True, False, True]


def test_nothing_to_choose():
    assert find_cuts([], [], lambda value: value) == []
    (cut,) = find_cuts([Segment(0, 0, lambda: torch.ones(3))], [0], lambda value: value)
    assert not cut.chosen(torch.ones(3), 0).any() and cut.with_ties == cut


@pytest.mark.parametrize(
    ("scores", "count", "sentence"),
    [
        (torch.tensor([1.0, float("nan"), 2]), 1, "group 0 contain NaN"),
        (torch.ones(3), 4, "cannot choose 4 of the 3 elements of group 0"),
        (torch.ones(3), -1, "counts must be >= 0, got -1"),
    ],
)
def test_every_rank_refuses(scores, count: int, sentence: str):
    def work(rank: int, all_reduce: Callable[[Tensor], Tensor]) -> list[Cut]:
        part = scores[rank : rank + 1] if rank < 2 else scores[2:]
        return find_cuts([Segment(0, rank, lambda: part)], [count], all_reduce)

    for error in in_step(3, work):
        assert isinstance(error, ValueError) and sentence in str(error)

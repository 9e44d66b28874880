"""Two counting passes over parts against a full sort, for every kind of score."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from forgetscale.masks.radix import (
    LOWER_BINS,
    RunningCut,
    count_upper,
    locate,
    upper_bins,
)

KINDS = ("random", "constant", "zeros", "ties", "denormal", "wide")


def keys_of(kind: str, size: int = 3001) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(kind))
    values = torch.rand(size, generator=generator)
    if kind == "constant":
        values = torch.full((size,), 0.3)
    elif kind == "zeros":
        values = torch.where(values < 0.7, 0.0, values)
    elif kind == "ties":
        values = torch.round(values * 7)
    elif kind == "denormal":
        values = values * 1e-41
    elif kind == "wide":
        values = torch.exp(60 * (values - 0.5))
    return values.view(torch.int32)


def taken_in_parts(keys: torch.Tensor, count: int, side: str, parts: int) -> torch.Tensor:
    pieces = torch.tensor_split(keys, parts)
    place = locate(sum(count_upper(piece) for piece in pieces).numpy(), count, side)
    if place is None:
        return torch.cat([RunningCut(None, side, 0).take(piece) for piece in pieces])
    lower = []
    for piece in pieces:
        inside = piece[upper_bins(piece) == place.bin] & (LOWER_BINS - 1)
        lower.append(np.bincount(inside.numpy(), minlength=LOWER_BINS))
    low = locate(np.sum(lower, axis=0), place.take, side)
    running = RunningCut(place.bin << 16 | low.bin, side, low.take)
    return torch.cat([running.take(piece) for piece in pieces])


@pytest.mark.parametrize("side", ["top", "bottom"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_full_sort_agrees_in_any_number_of_parts(kind: str, side: str):
    keys = keys_of(kind)
    order = torch.argsort(keys, descending=side == "top", stable=True)
    for count in (0, 1, 30, 600, 1800, keys.numel() - 1, keys.numel()):
        wanted = torch.zeros(keys.numel(), dtype=torch.bool)
        wanted[order[:count]] = True
        for parts in (1, 2, 3, 8, 17):
            assert torch.equal(taken_in_parts(keys, count, side, parts), wanted), (count, parts)


@pytest.mark.parametrize("count", [-1, 5])
def test_impossible_counts(count: int):
    with pytest.raises(ValueError, match="of 4 elements"):
        locate(np.array([1, 3]), count, "top")

"""Exact k-th largest of data too large for memory: two passes over bit patterns, many cuts at once.

Like ``find_cuts``, but for passes over files: keys are 31-bit, counted by their upper 15 bits in a
first pass and, inside the few bins where cuts fall, by their lower 16 bits in a second. State is
independent of the number of elements and of how many are equal.

Shape letters: S elements of a slice, H upper bins, L lower bins.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Int32, Int64
from torch import Tensor

Side = Literal["top", "bottom"]
UPPER_BINS, LOWER_BINS = 1 << 15, 1 << 16
FIRST_NON_FINITE = 0x7F80
"""Upper bin from which on a key is the pattern of an infinity or NaN."""


def upper_bins(keys: Int32[Tensor, " S"]) -> Tensor:
    """Return the upper 15 bits of non-negative keys, as int32."""
    return keys >> 16


def count_upper(keys: Int32[Tensor, " S"]) -> Int64[Tensor, " H"]:
    """Count keys >= 0 by their upper 15 bits."""
    return torch.bincount(upper_bins(keys), minlength=UPPER_BINS)


@dataclass(frozen=True, slots=True)
class Place:
    """The bin a cut falls into, and how many of the bin's elements it takes."""

    bin: int
    take: int


def locate(counts: np.ndarray, count: int, side: Side) -> Place | None:
    """Find the bin that holds the ``count``-th element from one side.

    Args:
        counts: Elements per bin, ascending keys.
        count: Elements to take, 0 to the sum of ``counts``.
        side: ``top`` takes the largest keys, ``bottom`` the smallest.

    Returns:
        The bin and how many to take from it (1 to its size), or None where ``count`` is 0.

    Raises:
        ValueError: ``count`` is negative or larger than the number of elements.
    """
    total = int(counts.sum())
    if not 0 <= count <= total:
        raise ValueError(f"cannot take {count} of {total} elements")
    if count == 0:
        return None
    ordered = counts[::-1] if side == "top" else counts
    sums = np.cumsum(ordered)
    place = int(np.searchsorted(sums, count))
    before = int(sums[place]) - int(ordered[place])
    found = len(counts) - 1 - place if side == "top" else place
    return Place(found, count - before)


@dataclass(slots=True)
class RunningCut:
    """A cut applied to slices in canonical order: keys beyond ``key``, and the first equal ones.

    Args:
        key: Threshold; None takes nothing.
        side: Which keys lie beyond.
        equal: Elements equal to the threshold that are still to be taken; counts down.
    """

    key: int | None
    side: Side
    equal: int

    def take(self, keys: Int32[Tensor, " S"]) -> Bool[Tensor, " S"]:
        """Return which elements of the next slice are taken."""
        if self.key is None:
            return torch.zeros(keys.numel(), dtype=torch.bool)
        taken = keys > self.key if self.side == "top" else keys < self.key
        if self.equal > 0:
            places = (keys == self.key).nonzero()[: self.equal, 0]
            taken[places] = True
            self.equal -= places.numel()
        return taken

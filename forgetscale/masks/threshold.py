"""Exact k-th largest over slices, without gathering or sorting: a histogram of bit patterns.

Scores become 32-bit integers of the same order. Three passes count them digit by digit (11, 11 and
10 bits); one sum over ranks per pass narrows every group to the exact integer of its k-th largest.
Where that value occurs more often than needed, further passes count the positions of equal scores
the same way, and those with the lowest positions are chosen. So exactly k elements are chosen, the
same ones for any number of ranks, and no rank sees more than its own slices and the counts.

Shape letters: S elements of a slice, G groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int32, Int64
from torch import Tensor

AllReduce = Callable[[Tensor], Tensor]
"""Sum over ranks of a small int64 tensor. Collective: every rank must call it."""

CHUNK = 1 << 24
_DIGITS = ((21, 11), (10, 11), (0, 10))
_BINS = 2048
_OFFSET = 1 << 31
_NOTHING = (1 << 31) - 1


@dataclass(frozen=True, slots=True)
class Segment:
    """One slice of one tensor, as a threshold search sees it."""

    group: int
    """Elements of one group are ranked together: 0 for all where one threshold serves the model."""
    start: int
    """Position of the first element in the group's order, which decides between equal scores."""
    scores: Callable[[], Tensor]
    """``[S]`` fp32 scores, or int32 keys; called once a pass, so nothing of full size is kept."""


@dataclass(frozen=True, slots=True)
class Cut:
    """Which elements of a group are chosen: keys above ``key``, and equal ones before ``end``."""

    key: int
    end: int

    def chosen(self, scores: Tensor, start: int) -> Bool[Tensor, " S"]:
        """Return the choice for a slice.

        Args:
            scores: fp32 scores or int32 keys of the slice.
            start: Position of its first element in the group's order.
        """
        keys = order_keys(scores)
        first = min(max(self.end - start, 0), keys.numel())
        found = keys > self.key
        found[:first] |= keys[:first] == self.key
        return found

    @property
    def with_ties(self) -> Cut:
        """The cut that chooses every element equal to the k-th largest."""
        return self if self.key == _NOTHING else Cut(self.key, 1 << 62)


def order_keys(scores: Float[Tensor, " S"] | Int32[Tensor, " S"]) -> Int32[Tensor, " S"]:
    """Return int32 keys in the order of the scores; equal scores (0 and -0 too) get equal keys.

    Args:
        scores: fp32 scores; int32 values pass as they are and must be below ``2**31 - 1``.
    """
    if scores.dtype == torch.int32:
        return scores
    if scores.dtype != torch.float32:
        raise ValueError(f"scores must be float32 or int32, got {scores.dtype}")
    bits = (scores + 0.0).view(torch.int32)
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def find_cuts(
    segments: Sequence[Segment], counts: Sequence[int], all_reduce: AllReduce
) -> list[Cut]:
    """Find, for every group, the cut that chooses its ``counts[group]`` largest scores.

    Args:
        segments: This rank's slices. Over all ranks they cover each group once.
        counts: How many elements to choose per group, >= 0; the same on every rank.
        all_reduce: Sum over ranks.

    Returns:
        One cut per group, the same on every rank; equal scores are chosen by lower position.

    Raises:
        ValueError: A group has fewer elements than asked for, or a score is NaN.

    Collective: every rank must call it (three sums of ``G x 2049`` counts, and one per 11 bits of
    the largest position where equal scores must be told apart).
    """
    left = torch.tensor(list(counts), dtype=torch.int64)
    if not counts:
        return []
    if int(left.min()) < 0:
        raise ValueError(f"counts must be >= 0, got {int(left.min())}")
    prefix = torch.zeros(len(counts), dtype=torch.int64)
    equal = torch.zeros(len(counts), dtype=torch.int64)
    for number, (shift, bits) in enumerate(_DIGITS):
        table = _count(segments, len(counts), prefix, shift, bits, first=number == 0)
        table = all_reduce(table)
        if number == 0:
            _check_totals(table, counts)
        digit, left, equal = _descend(table[:, :_BINS].flip(1), left)
        digit = _BINS - 1 - digit
        prefix = prefix | (digit << shift)
    ends = _tie_ends(segments, prefix, left, equal, all_reduce)
    return [
        Cut(int(prefix[group]) - _OFFSET, ends[group]) if count > 0 else Cut(_NOTHING, 0)
        for group, count in enumerate(counts)
    ]


def _check_totals(table: Tensor, counts: Sequence[int]) -> None:
    for group, count in enumerate(counts):
        if int(table[group, _BINS]):
            raise ValueError(f"scores of group {group} contain NaN; check weights and data")
        total = int(table[group, :_BINS].sum())
        if count > total:
            raise ValueError(f"cannot choose {count} of the {total} elements of group {group}")


def _descend(table: Tensor, left: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the bin that holds the ``left``-th element, what is left within, and its size."""
    sums = table.cumsum(1)
    digit = (sums < left[:, None]).sum(1).clamp(max=_BINS - 1)
    size = table.gather(1, digit[:, None])[:, 0]
    before = sums.gather(1, digit[:, None])[:, 0] - size
    return digit, left - before, size


def _count(
    segments: Sequence[Segment], groups: int, prefix: Tensor, shift: int, bits: int, *, first: bool
) -> Int64[Tensor, "G bins"]:
    """Count the next digit of keys whose higher digits equal ``prefix``; NaN in the last bin."""
    table = torch.zeros(groups, _BINS + 1, dtype=torch.int64)
    for segment in segments:
        values = segment.scores()
        for part in torch.split(values, CHUNK):
            if first and part.dtype == torch.float32:
                table[segment.group, _BINS] += int(torch.isnan(part).sum())
            # As unsigned: the sign bit flipped, so that digits count from the lowest key upwards.
            keys = order_keys(part)
            if not first:
                high = (int(prefix[segment.group]) - _OFFSET) >> (shift + bits)
                keys = keys[keys >> (shift + bits) == high]
            digit = (keys >> shift) & ((1 << bits) - 1)
            if first:
                digit = digit ^ (1 << (bits - 1))
            table[segment.group, :_BINS] += torch.bincount(digit, minlength=_BINS).cpu()
    return table


def _tie_ends(
    segments: Sequence[Segment], prefix: Tensor, left: Tensor, equal: Tensor, all_reduce: AllReduce
) -> list[int]:
    """Return per group the position before which elements equal to the threshold are chosen."""
    ends = torch.full_like(left, 1 << 62)
    open_groups = (left > 0) & (equal > left)
    if not bool(open_groups.any()):
        return [int(end) for end in ends]
    places: list[tuple[int, Tensor]] = []
    largest = torch.zeros(64, dtype=torch.int64)
    for segment in segments:
        if bool(open_groups[segment.group]):
            keys = order_keys(segment.scores())
            found = (keys == int(prefix[segment.group]) - _OFFSET).nonzero()[:, 0].cpu()
            places.append((segment.group, found + segment.start))
            if found.numel():
                largest[int(places[-1][1][-1]).bit_length()] += 1
    width = int(all_reduce(largest).nonzero().max())
    positions = torch.zeros_like(left)
    for shift in range(max(-(-width // 11) - 1, 0) * 11, -1, -11):
        table = torch.zeros(left.numel(), _BINS, dtype=torch.int64)
        for group, place in places:
            inside = place[place >> (shift + 11) == int(positions[group]) >> (shift + 11)]
            table[group] += torch.bincount((inside >> shift) & (_BINS - 1), minlength=_BINS)
        digit, left, _ = _descend(all_reduce(table), left)
        positions = positions | (digit << shift)
    return [
        int(positions[group]) + 1 if bool(open_groups[group]) else int(ends[group])
        for group in range(left.numel())
    ]

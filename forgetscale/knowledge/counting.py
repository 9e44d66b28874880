"""Exact cuts over whole models: count upper halves of keys, then lower halves in a few bins.

Every function here works on one part of the model or joins the results of all parts; what passes
between them are small arrays in files, so parts may be done by any process at any time.

Source:
    knowledge analysis of arXiv:2509.16596 done out of core: the k-th largest of 68e9 scores needs
    two reading passes and 256 KiB per group.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping

import numpy as np

from forgetscale.errors import DataError
from forgetscale.knowledge.blocks import Block
from forgetscale.knowledge.setup import Setup
from forgetscale.masks.radix import (
    FIRST_NON_FINITE,
    LOWER_BINS,
    UPPER_BINS,
    Place,
    RunningCut,
    count_upper,
    locate,
    upper_bins,
)

Arrays = dict[str, np.ndarray]
Places = dict[tuple[int, str], Place | None]
"""(cut, group) -> bin of the upper half, and how many of it are taken."""
Cuts = dict[tuple[int, str], tuple[int | None, int]]
"""(cut, group) -> threshold key and how many equal elements are taken."""


_NONE = np.zeros(0, np.int64)


def count_part(setup: Setup, part: int) -> Arrays:
    """First pass over one part: elements per upper bin, for every ranking and group.

    Raises:
        DataError: A weight is NaN or infinite.
    """
    counts: dict[tuple[int, str], np.ndarray] = {}
    for number, start, length in setup.blocks(setup.parts[part]):
        block = Block(setup, number, start, length)
        for index, ranking in enumerate(setup.plan.rankings):
            table = count_upper(block.keys(ranking)).numpy()
            if ranking.score != "random" and table[FIRST_NON_FINITE:].any():
                block.require_finite()
                raise DataError(
                    f"the {ranking.score} score of {block.entry.name} overflows fp32; raise --eps"
                    " or leave the tensor out with --exclude."
                )
            place = (index, block.entry.group(ranking.scope))
            if place in counts:
                counts[place] += table
            else:
                counts[place] = table
    return {f"{index}/{group}": table for (index, group), table in counts.items()}


def join_counts(setup: Setup, results: Iterable[Mapping[str, np.ndarray]]) -> Places:
    """Find the bin of every cut from the counts of all parts."""
    tables: dict[str, np.ndarray] = {}
    for arrays in results:
        for name, table in arrays.items():
            tables[name] = tables[name] + table if name in tables else table
    places: Places = {}
    for number, cut in enumerate(setup.plan.cuts):
        ranking = setup.plan.rankings[cut.ranking]
        sizes = setup.sizes(ranking.scope)
        for group, size in sizes.items():
            table = tables[f"{cut.ranking}/{group}"]
            assert int(table.sum()) == size, (group, int(table.sum()), size)
            places[number, group] = locate(table, cut.count(size), cut.side)
    return places


def _bins(places: Places, setup: Setup) -> dict[tuple[int, str], list[int]]:
    wanted: dict[tuple[int, str], set[int]] = {}
    for (number, group), place in places.items():
        if place is not None:
            wanted.setdefault((setup.plan.cuts[number].ranking, group), set()).add(place.bin)
    return {key: sorted(bins) for key, bins in wanted.items()}


class _LowerTable:
    """Counts by lower half, of values that come a few at a time.

    A block has few elements in a bin: adding a table of 65,536 for each would cost more than to
    read it, so values wait until there are as many.
    """

    def __init__(self) -> None:
        self._counts = np.zeros(LOWER_BINS, np.int64)
        self._waiting: list[np.ndarray] = []
        self._num_waiting = 0

    def add(self, values: np.ndarray) -> None:
        """Count values in 0..65,535."""
        self._waiting.append(values)
        self._num_waiting += values.size
        if self._num_waiting >= LOWER_BINS:
            self.counts()

    def counts(self) -> np.ndarray:
        """Return the counts of everything added."""
        if self._waiting:
            self._counts += np.bincount(np.concatenate(self._waiting), minlength=LOWER_BINS)
            self._waiting, self._num_waiting = [], 0
        return self._counts


def refine_part(setup: Setup, part: int, places: Places) -> Arrays:
    """Second pass over one part: elements per lower half, in the bins where cuts fall."""
    wanted = _bins(places, setup)
    open_tables: dict[tuple[int, str, int], _LowerTable] = {}
    closed: dict[tuple[int, str, int], tuple[np.ndarray, np.ndarray]] = {}
    left = _last_blocks(setup, part)
    for number, start, length in setup.blocks(setup.parts[part]):
        block = Block(setup, number, start, length)
        for index, ranking in enumerate(setup.plan.rankings):
            group = block.entry.group(ranking.scope)
            bins = wanted.get((index, group), [])
            if not bins:
                continue
            keys = block.keys(ranking)
            upper, wide = upper_bins(keys).numpy(), keys.numpy()
            for wanted_bin in bins:
                lower = wide[upper == wanted_bin] & (LOWER_BINS - 1)
                if lower.size:
                    place = (index, group, wanted_bin)
                    open_tables.setdefault(place, _LowerTable()).add(lower)
        for place in [p for p in open_tables if left[p[0], p[1]] == (number, start)]:
            table = open_tables.pop(place).counts()
            (lows,) = table.nonzero()
            closed[place] = (lows.astype(np.uint16), table[lows])
    assert not open_tables
    found: Arrays = {}
    for (index, group, wanted_bin), (lows, counts) in closed.items():
        found[f"{index}/{wanted_bin}/low/{group}"] = lows
        found[f"{index}/{wanted_bin}/count/{group}"] = counts
    return found


def _last_blocks(setup: Setup, part: int) -> dict[tuple[int, str], tuple[int, int]]:
    """Return the last block of each ranking and group in a part, after which tables close."""
    found: dict[tuple[int, str], tuple[int, int]] = {}
    for number, start, _ in setup.blocks(setup.parts[part]):
        for index, ranking in enumerate(setup.plan.rankings):
            found[index, setup.entries[number].group(ranking.scope)] = (number, start)
    return found


def join_refined(
    setup: Setup, places: Places, results: Collection[Mapping[str, np.ndarray]]
) -> tuple[Cuts, list[dict[tuple[int, str], int]]]:
    """Find exact thresholds, and how many equal elements each part takes.

    Args:
        setup: Opened inputs.
        places: From ``join_counts``.
        results: From ``refine_part``, in the order of the parts; gone through twice.

    Returns:
        The cuts; and for each part (cut, group) -> equal elements left for it and later parts.
    """
    last = _last_parts(setup)
    totals: dict[tuple[int, str, int], np.ndarray] = {}
    cuts: Cuts = {place: (None, 0) for place in places}
    for part, arrays in enumerate(results):
        for place, lows, counts in _refined(arrays):
            if place not in totals:
                totals[place] = np.zeros(LOWER_BINS, np.int64)
            totals[place][lows] += counts
        # A group's tables go when its last part is in: only open groups are held.
        for (number, group), found in places.items():
            cut = setup.plan.cuts[number]
            scope = setup.plan.rankings[cut.ranking].scope
            if found is not None and last[scope, group] == part:
                low = locate(totals[cut.ranking, group, found.bin], found.take, cut.side)
                assert low is not None
                cuts[number, group] = (found.bin << 16 | low.bin, low.take)
        for place in [p for p in totals if last[setup.plan.rankings[p[0]].scope, p[1]] == part]:
            del totals[place]
    return cuts, _left_by_part(setup, cuts, results)


def _left_by_part(
    setup: Setup, cuts: Cuts, results: Iterable[Mapping[str, np.ndarray]]
) -> list[dict[tuple[int, str], int]]:
    """Return for each part, and each cut of a group in it, how many equal elements are left."""
    rankings = [setup.plan.rankings[cut.ranking] for cut in setup.plan.cuts]
    left: list[dict[tuple[int, str], int]] = []
    used: dict[tuple[int, str], int] = {}
    for part, arrays in enumerate(results):
        tables = {place: (lows, counts) for place, lows, counts in _refined(arrays)}
        left.append({})
        entries = {span.entry for span in setup.parts[part]}
        for number, ranking in enumerate(rankings):
            for group in {setup.entries[entry].group(ranking.scope) for entry in entries}:
                key, take = cuts.get((number, group), (None, 0))
                rest = take - used.get((number, group), 0)
                if key is None or rest <= 0:
                    continue
                left[-1][number, group] = rest
                lows, counts = tables.get(
                    (setup.plan.cuts[number].ranking, group, key >> 16), (_NONE, _NONE)
                )
                equal = int(counts[lows == (key & (LOWER_BINS - 1))].sum())
                used[number, group] = used.get((number, group), 0) + equal
    return left


def _last_parts(setup: Setup) -> dict[tuple[str, str], int]:
    scopes = {ranking.scope for ranking in setup.plan.rankings}
    found: dict[tuple[str, str], int] = {}
    for number, spans in enumerate(setup.parts):
        for span in spans:
            for scope in scopes:
                found[scope, setup.entries[span.entry].group(scope)] = number
    return found


def _refined(
    arrays: Mapping[str, np.ndarray],
) -> Iterator[tuple[tuple[int, str, int], np.ndarray, np.ndarray]]:
    for name, lows in arrays.items():
        index, upper, kind, group = name.split("/", 3)
        if kind == "low":
            counts = arrays[f"{index}/{upper}/count/{group}"]
            yield (int(index), group, int(upper)), lows.astype(np.int64), counts


def running_cuts(
    setup: Setup, cuts: Cuts, left: Mapping[tuple[int, str], int]
) -> dict[tuple[int, str], RunningCut]:
    """Return the cuts as one part applies them."""
    return {
        (number, group): RunningCut(key, setup.plan.cuts[number].side, left.get((number, group), 0))
        for (number, group), (key, _) in cuts.items()
    }


def histogram_bytes(num_groups: int, num_rankings: int = 1) -> int:
    """Return bytes of the joined counts of the first pass, the largest lasting state."""
    return num_groups * num_rankings * UPPER_BINS * 8

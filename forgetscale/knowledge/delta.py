"""What tuning changed, in numbers: who holds which share of the change, beside a null model.

Elements are ranked by relative change ``r = |d| / (|source| + eps)``. For each fraction of them the
shares of sum r, sum |d| and sum d^2 are given. The null model is the same source with a random
update: Gaussian, of the tensor's own root mean square, rounded to the stored type. A share that the
null has too says nothing about tuning.

Shape letters: S elements of a block, H upper bins, L lower bins; tables are ``[4, H]``: elements,
sum r, sum |d|, sum d^2 per bin of r.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from forgetscale.errors import DataError
from forgetscale.knowledge.blocks import Block
from forgetscale.knowledge.counting import Arrays
from forgetscale.knowledge.setup import Setup
from forgetscale.masks.radix import (
    FIRST_NON_FINITE,
    LOWER_BINS,
    UPPER_BINS,
    locate,
    upper_bins,
)

SCOPES = ("tensor", "layer", "module")
MEASURES = ("sum_r", "sum_abs", "sum_sq")
SCALARS = ("elements", "unchanged", "flipped", "source_sq", "tuned_sq", "product", "max_r")
TOLERANCE = 0.01
"""Shares that differ by less than this are called equal: the paper's ten models differ by 0.009."""


def _tables(upper: Tensor, r: Tensor, change: Tensor, bins: int) -> np.ndarray:
    wide, size = r.double(), change.double()
    counts = torch.bincount(upper, minlength=bins).double()
    rows = [counts]
    rows += [torch.bincount(upper, w, minlength=bins) for w in (wide, size, size.square())]
    return torch.stack(rows).numpy()


class _Open:
    """The table of one tensor at a time; closed ones are kept sparse."""

    def __init__(self) -> None:
        self.closed: Arrays = {}
        self._key: str | None = None
        self._table = np.zeros((4, UPPER_BINS))

    def add(self, key: str, table: np.ndarray) -> None:
        if key != self._key:
            self.close()
            self._key = key
            self._table = np.zeros((4, UPPER_BINS))
        self._table += table

    def close(self) -> Arrays:
        if self._key is not None:
            (bins,) = self._table[0].nonzero()
            self.closed[f"bins/{self._key}"] = bins
            self.closed[f"table/{self._key}"] = self._table[:, bins]
            self._key = None
        return self.closed


def delta_part(setup: Setup, part: int) -> Arrays:
    """Tables and sums of one part, by tensor.

    Raises:
        DataError: A weight is NaN or infinite.
    """
    tables = _Open()
    scalars: Arrays = {}
    for number, start, length in setup.blocks(setup.parts[part]):
        block = Block(setup, number, start, length)
        key = block.entry.key
        r = block.keys(setup.plan.rankings[0]).view(torch.float32)
        upper = upper_bins(r.view(torch.int32))
        if int(upper.max()) >= FIRST_NON_FINITE:
            block.require_finite()
            raise DataError(f"the relative change of {block.entry.name} overflows; raise --eps.")
        change = block.delta(0)
        tables.add(key, _tables(upper, r, change.abs(), UPPER_BINS))
        before, after = block.source.double(), block.tuned(0).double()
        found = np.array(
            [
                length,
                int((change == 0).sum()),
                int((before * after < 0).sum()),
                float(before.square().sum()),
                float(after.square().sum()),
                float((before * after).sum()),
                float(r.max()),
            ]
        )
        old = scalars.get(f"scalars/{key}")
        if old is not None:
            found = np.append(found[:-1] + old[:-1], max(found[-1], old[-1]))
        scalars[f"scalars/{key}"] = found
    return tables.close() | scalars


def refine_delta(setup: Setup, part: int, bins: Sequence[int]) -> Arrays:
    """Tables by lower half of the score, inside the bins where the fractions' cuts fall."""
    found = {wanted: np.zeros((4, LOWER_BINS)) for wanted in bins}
    for number, start, length in setup.blocks(setup.parts[part]):
        block = Block(setup, number, start, length)
        keys = block.keys(setup.plan.rankings[0])
        upper, change = upper_bins(keys), block.delta(0).abs()
        for wanted, table in found.items():
            inside = upper == wanted
            lower = keys[inside] & (LOWER_BINS - 1)
            r = keys[inside].view(torch.float32)
            table += _tables(lower, r, change[inside], LOWER_BINS)
    arrays: Arrays = {}
    for wanted, table in found.items():
        (lows,) = table[0].nonzero()
        arrays[f"bins/{wanted}"], arrays[f"table/{wanted}"] = lows, table[:, lows]
    return arrays


def null_part(setup: Setup, part: int, sizes: Mapping[str, float], every: int, seed: int) -> Arrays:
    """Tables of a random update of the same source, from every ``every``-th block.

    Args:
        setup: Opened inputs.
        part: Which part.
        sizes: Root mean square of the change, by tensor.
        every: Blocks skipped count through their neighbours: sums are multiplied by it.
        seed: Of the update.
    """
    tables = _Open()
    eps = setup.request.options.eps
    for place, (number, start, length) in enumerate(setup.blocks(setup.parts[part])):
        if place % every:
            continue
        entry = setup.entries[number]
        source = setup.source.read(entry.source_name, start, length)
        generator = torch.Generator()
        generator.manual_seed(xxhash.xxh3_64_intdigest(f"{seed}/{entry.key}/{start}".encode()) >> 1)
        step = torch.randn(length, generator=generator) * sizes[entry.key]
        before = source.float()
        after = (before + step).to(entry.stored.dtype).float()
        change = (after - before).abs()
        r = change / (before.abs() + eps)
        upper = upper_bins(r.view(torch.int32))
        tables.add(entry.key, every * _tables(upper, r, change, UPPER_BINS))
    return tables.close()


def _dense(arrays: Mapping[str, np.ndarray], name: str, size: int) -> np.ndarray:
    table = np.zeros((4, size))
    table[:, arrays[f"bins/{name}"]] = arrays[f"table/{name}"]
    return table


def shares(table: np.ndarray, count: float) -> list[float]:
    """Return the shares of sum r, sum |d| and sum d^2 that the ``count`` largest r hold.

    Inside the bin where the cut falls (1/128 of a factor of two wide) elements count alike.
    """
    place = locate(table[0].astype(np.int64), round(count), "top")
    totals = table[1:].sum(1)
    held = np.zeros(3)
    if place is not None:
        held = table[1:, place.bin + 1 :].sum(1)
        held = held + table[1:, place.bin] * (place.take / table[0, place.bin])
    return [float(part) for part in np.divide(held, totals, out=np.zeros(3), where=totals > 0)]


def taken_share(table: np.ndarray, place_bin: int, part_of_bin: float) -> float:
    """Return the share of a group's elements beyond a cut that was made over the whole model."""
    total = table[0].sum()
    beyond = table[0, place_bin + 1 :].sum() + table[0, place_bin] * part_of_bin
    return float(beyond / total) if total else 0.0


class GroupTables:
    """Tables by tensor, layer and module from parts in canonical order; closed groups are let go.

    Args:
        setup: Opened inputs.
        close: Receives (scope, group, table) once for each finished group.
    """

    def __init__(self, setup: Setup, close: Callable[[str, str, np.ndarray], None]) -> None:
        self._setup = setup
        self._close = close
        self._open: dict[tuple[str, str], np.ndarray] = {}
        self._left: dict[tuple[str, str], int] = {}
        for entry in setup.entries:
            if entry.edited:
                for scope in SCOPES:
                    place = (scope, entry.group(scope))
                    self._left[place] = self._left.get(place, 0) + 1
        self.whole = np.zeros((4, UPPER_BINS))

    def run(self, results: Iterable[Mapping[str, np.ndarray]]) -> np.ndarray:
        """Go through all parts; return the table of the whole model."""
        entries = {entry.key: entry for entry in self._setup.entries if entry.edited}
        current: str | None = None
        for arrays in results:
            for name in arrays:
                kind, key = name.split("/", 1)
                if kind != "bins":
                    continue
                if current not in (None, key):
                    self._finish(entries[str(current)].group)
                current = key
                table = _dense(arrays, key, UPPER_BINS)
                self.whole += table
                for scope in SCOPES:
                    place = (scope, entries[key].group(scope))
                    old = self._open.get(place)
                    self._open[place] = table.copy() if old is None else old + table
        if current is not None:
            self._finish(entries[current].group)
        for place in list(self._open):
            self._close(*place, self._open.pop(place))
        return self.whole

    def _finish(self, group: Callable[[str], str]) -> None:
        for scope in SCOPES:
            place = (scope, group(scope))
            self._left[place] -= 1
            if self._left[place] == 0 and place in self._open:
                self._close(*place, self._open.pop(place))


def join_scalars(
    setup: Setup, results: Iterable[Mapping[str, np.ndarray]]
) -> dict[tuple[str, str], np.ndarray]:
    """Return sums by (scope, group), in the order of ``SCALARS``."""
    entries = {entry.key: entry for entry in setup.entries if entry.edited}
    found: dict[tuple[str, str], np.ndarray] = {}
    for arrays in results:
        for name, values in arrays.items():
            kind, key = name.split("/", 1)
            if kind != "scalars":
                continue
            for scope in ("global", *SCOPES):
                place = (scope, entries[key].group(scope))
                old = found.get(place)
                found[place] = (
                    values
                    if old is None
                    else np.append(old[:-1] + values[:-1], max(old[-1], values[-1]))
                )
    return found


def exact_shares(
    whole: np.ndarray,
    counts: Sequence[int],
    refined: Collection[Mapping[str, np.ndarray]],
) -> list[list[float]]:
    """Return ``shares`` for each count, exact but for equal scores, which count alike."""
    places = [locate(whole[0].astype(np.int64), count, "top") for count in counts]
    tables = {place.bin: np.zeros((4, LOWER_BINS)) for place in places if place}
    for arrays in refined:
        for wanted, table in tables.items():
            table += _dense(arrays, str(wanted), LOWER_BINS)
    totals = whole[1:].sum(1)
    found = []
    for place in places:
        if place is None:
            found.append([0.0] * 3)
            continue
        table = tables[place.bin]
        low = locate(table[0].astype(np.int64), place.take, "top")
        assert low is not None
        held = whole[1:, place.bin + 1 :].sum(1) + table[1:, low.bin + 1 :].sum(1)
        held = held + table[1:, low.bin] * (low.take / table[0, low.bin])
        found.append([float(x) for x in np.divide(held, totals, out=np.zeros(3), where=totals > 0)])
    return found


def verdict(found: Sequence[Sequence[float]], null: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Compare the shares of sum r with the null model's."""
    largest = max(abs(a[0] - b[0]) for a, b in zip(found, null, strict=True))
    same = largest <= TOLERANCE
    return {
        "different": not same,
        "largest_difference": largest,
        "tolerance": TOLERANCE,
        "sentence": (
            "The concentration of relative change is"
            f" {'not different from' if same else 'different from'} the null model's: the largest"
            f" difference is {100 * largest:.2f} points"
            + (
                ", so it follows from dividing by the source weight, not from tuning."
                if same
                else f" (called equal up to {100 * TOLERANCE:.0f})."
            )
        ),
    }

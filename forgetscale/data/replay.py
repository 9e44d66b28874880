"""Replay of interrupted runs on the order of rows: is every row delivered exactly once?

Nothing here reads tokens. Ranks are played by the same ``RowStream`` that training reads from; what
they deliver is compared with the rows of one uninterrupted run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from forgetscale.data.mixture import MixedOrder
from forgetscale.data.skip_list import SkipList
from forgetscale.data.stream import RowStream

MAX_RANKS = 8
_SCHEDULES_PER_PLACE = 100
_CHUNK = 1 << 20


@dataclass(slots=True)
class ReplayResult:
    """Counts over all schedules."""

    schedules: int = 0
    interruptions: int = 0
    rows: int = 0
    """Rows that count: of batches up to the checkpoint a later start went on from."""
    lost: int = 0
    repeated: int = 0
    batches: int = 0
    """Global batches compared with those of an uninterrupted run on one rank."""
    different: int = 0

    @property
    def exact(self) -> bool:
        """Whether nothing was lost, repeated or different."""
        return not (self.lost or self.repeated or self.different)


@dataclass(frozen=True, slots=True)
class EpochResult:
    """One pass over one set."""

    name: str
    epoch: int
    missing: int
    """Rows that the order does not name."""
    repeated: int
    """Rows it names beyond once."""


def replay_schedules(
    make_order: Callable[[], MixedOrder],
    *,
    num_rows: int,
    global_batch_size: int,
    schedules: int,
    seed: int,
    skips: SkipList | None = None,
) -> ReplayResult:
    """Interrupt and resume a run in random ways and count what is lost and repeated.

    A schedule is a chain of starts. Each start draws a rank count from 1 to 8, keeps the global
    batch size or draws another one, makes some steps, and is interrupted; the next one goes on from
    a checkpoint at or before the interruption. Places are spread over three epochs; every other
    one is at the border of two.

    Args:
        make_order: Opens the order anew, as a new process would.
        num_rows: Rows of an epoch (all sets of a mixture together).
        global_batch_size: Of the recipe, >= 1.
        schedules: How many, >= 1.
        seed: Of the random schedules.
        skips: Skip list of the run, or None.
    """
    random = np.random.default_rng(seed)
    result = ReplayResult()
    while result.schedules < schedules:
        place = int(random.integers(0, 3 * num_rows))
        if random.integers(2):
            place = max(0, place // num_rows * num_rows - int(random.integers(global_batch_size)))
        for _ in range(min(_SCHEDULES_PER_PLACE, schedules - result.schedules)):
            _replay_one(make_order, place, global_batch_size, random, skips, result)
    return result


def _replay_one(
    make_order: Callable[[], MixedOrder],
    place: int,
    batch_size: int,
    random: np.random.Generator,
    skips: SkipList | None,
    result: ReplayResult,
) -> None:
    """Play one schedule from position ``place`` and add its counts to ``result``."""
    cursor, kept = place, []
    size = batch_size
    num_starts = int(random.integers(2, 6))
    for _ in range(num_starts):
        if random.integers(3) == 0:
            size = int(random.integers(1, 2 * batch_size + 1))
        world = int(random.integers(1, MAX_RANKS + 1))
        num_steps = int(random.integers(1, 5))
        num_safe = int(random.integers(0, num_steps + 1))
        order = make_order()
        ranks = [
            RowStream(
                order, skips, global_batch_size=size, rank=rank, world_size=world, cursor=cursor
            )
            for rank in range(world)
        ]
        alone = RowStream(
            make_order(), skips, global_batch_size=size, rank=0, world_size=1, cursor=cursor
        )
        for step in range(num_steps):
            shares = [next(rank) for rank in ranks]
            rows = np.concatenate([_keys(share.set_ids, share.row_ids) for share in shares])
            expected = next(alone)
            result.batches += 1
            result.different += not (
                np.array_equal(rows, _keys(expected.set_ids, expected.row_ids))
                and {share.cursor for share in shares} == {expected.cursor}
            )
            if step < num_safe:
                skipped = np.concatenate([share.skipped for share in shares])
                kept.append(rows[~skipped])
                cursor = shares[0].cursor
    result.schedules += 1
    result.interruptions += num_starts
    delivered = np.concatenate([np.empty(0, np.int64), *kept])
    set_ids, rows = make_order().draw(place, cursor - place)
    wanted = _keys(set_ids, rows)
    if skips is not None:
        wanted = wanted[~skips.skipped(place, set_ids, rows)]
    lost, repeated = _compare(wanted, delivered)
    result.rows += len(delivered)
    result.lost += lost
    result.repeated += repeated


def _keys(
    set_ids: Int64[np.ndarray, " rows"], row_ids: Int64[np.ndarray, " rows"]
) -> Int64[np.ndarray, " rows"]:
    """Return one number for each (set, row)."""
    keys: np.ndarray = (set_ids << 48) + row_ids
    return keys


def _compare(
    wanted: Int64[np.ndarray, " n"], delivered: Int64[np.ndarray, " m"]
) -> tuple[int, int]:
    """Return how many rows are wanted but not delivered, and delivered but not wanted."""
    keys, inverse = np.unique(np.concatenate([wanted, delivered]), return_inverse=True)
    surplus = np.bincount(inverse[len(wanted) :], minlength=len(keys)) - np.bincount(
        inverse[: len(wanted)], minlength=len(keys)
    )
    return int(-surplus[surplus < 0].sum()), int(surplus[surplus > 0].sum())


def check_epoch(
    rows_at: Callable[[int, int], Int64[np.ndarray, " n"]], num_rows: int, *, name: str, epoch: int
) -> EpochResult:
    """Walk one whole epoch of one set and count rows that are missing or come again.

    Args:
        rows_at: ``RowOrder.rows``: first position and count to row numbers.
        num_rows: Rows of the set, >= 1.
        name: Of the set, for the result.
        epoch: 0 for the first.
    """
    seen = np.zeros(num_rows, dtype=np.uint8)
    repeated = 0
    for first in range(0, num_rows, _CHUNK):
        rows = rows_at(epoch * num_rows + first, min(_CHUNK, num_rows - first))
        fresh = np.unique(rows)
        repeated += len(rows) - len(fresh) + int(np.count_nonzero(seen[fresh]))
        seen[fresh] = 1
    return EpochResult(name, epoch, int(num_rows - np.count_nonzero(seen)), repeated)

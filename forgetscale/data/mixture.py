"""Order of rows over several token sets: exact shares at every moment, any position at once.

Pure integer arithmetic. With whole shares ``a_1 .. a_k`` that sum to the period ``P``, the r-th
row of set i must stand in the window ``floor((r - 1) * P / a_i) <= position < ceil(r * P / a_i)``.
A sequence that keeps to these windows has, after any n rows, floor or ceil of ``n * a_i / P`` rows
of each set, and taking the row with the earliest deadline keeps to them whenever that is possible;
it is, since the shares fill the positions exactly. The pattern repeats after P rows, so one table
of P entries answers for every position.

Source: S. Baruah, N. Cohen, C. G. Plaxton, D. Varvel, "Proportionate progress", Algorithmica 15
(1996), windows of the subtasks; R. Tijdeman, "The chairman assignment problem", Discrete
Mathematics 32 (1980), that such sequences exist.
"""

from __future__ import annotations

import functools
import heapq
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64

from forgetscale.data.order import RowOrder


def share_pattern(shares: Sequence[int]) -> Int64[np.ndarray, " period"]:
    """Return which set stands at each position of one period.

    Args:
        shares: Rows of each set in one period, each >= 1; the period is their sum.

    Raises:
        ValueError: There are no shares, or one is below 1.
    """
    if not shares or min(shares) < 1:
        raise ValueError(f"shares must be whole numbers >= 1, got {list(shares)}")
    period = sum(shares)
    pattern = np.zeros(period, dtype=np.int64)
    if len(shares) == 1:
        return pattern
    done = [0] * len(shares)
    waiting = [(0, index) for index in range(len(shares))]
    ready: list[tuple[int, int]] = []
    for position in range(period):
        while waiting and waiting[0][0] <= position:
            index = heapq.heappop(waiting)[1]
            heapq.heappush(ready, (-((done[index] + 1) * -period // shares[index]), index))
        deadline, index = heapq.heappop(ready)
        assert deadline > position, "a row came after its deadline"
        pattern[position] = index
        done[index] += 1
        if done[index] < shares[index]:
            heapq.heappush(waiting, (done[index] * period // shares[index], index))
    return pattern


@functools.lru_cache(maxsize=4)
def _tables(
    shares: tuple[int, ...],
) -> tuple[Int64[np.ndarray, " period"], Int64[np.ndarray, "sets period_plus_1"]]:
    """Return the pattern, and how many rows of each set stand before each of its positions."""
    pattern = share_pattern(shares)
    before = np.zeros((len(shares), len(pattern) + 1), dtype=np.int64)
    np.cumsum(pattern == np.arange(len(shares))[:, None], axis=1, out=before[:, 1:])
    return pattern, before


class MixedOrder:
    """Set and row at each global position.

    Each set goes through its own epochs in its own order; which set has a position depends on the
    shares alone.

    Args:
        orders: Row order of each set.
        shares: Rows of each set in one period, each >= 1; for one set any number.
    """

    def __init__(self, orders: Sequence[RowOrder], shares: Sequence[int]) -> None:
        if len(orders) != len(shares):
            raise ValueError(f"got {len(orders)} orders and {len(shares)} shares")
        self._orders = tuple(orders)
        used = tuple(shares) if len(shares) > 1 else (1,)
        self._shares = np.asarray(used, dtype=np.int64)
        self._period = sum(used)
        self._pattern, self._before = _tables(used)

    def counts(self, position: int) -> Int64[np.ndarray, " sets"]:
        """Return how many rows of each set stand before global position ``position``."""
        periods, rest = divmod(position, self._period)
        counts: np.ndarray = periods * self._shares + self._before[:, rest]
        return counts

    def draw(
        self, first: int, count: int
    ) -> tuple[Int64[np.ndarray, " count"], Int64[np.ndarray, " count"]]:
        """Return ``(set, row in the set)`` at positions ``first`` to ``first + count - 1``."""
        if len(self._orders) == 1:
            return np.zeros(count, dtype=np.int64), self._orders[0].rows(first, count)
        sets = self._pattern[np.arange(first, first + count) % self._period]
        rows = np.empty(count, dtype=np.int64)
        starts = self.counts(first)
        for index, order in enumerate(self._orders):
            mine = sets == index
            rows[mine] = order.rows(int(starts[index]), int(np.count_nonzero(mine)))
        return sets, rows

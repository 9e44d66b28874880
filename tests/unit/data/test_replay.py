"""Replayed interruptions find nothing in our order, and find each kind of broken one."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forgetscale.data.mixture import MixedOrder
from forgetscale.data.order import RowOrder
from forgetscale.data.replay import check_epoch, replay_schedules
from forgetscale.data.stream import RowStream


def order_of(sizes, shares=None):
    orders = [RowOrder(size, "hash", seed) for seed, size in enumerate(sizes)]
    return MixedOrder(orders, shares or [1] * len(sizes))


def replay(make, num_rows=50, schedules=40, batch=6):
    return replay_schedules(
        make, num_rows=num_rows, global_batch_size=batch, schedules=schedules, seed=1
    )


@settings(deadline=None, max_examples=12)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    batch=st.integers(1, 20),
    data=st.data(),
)
def test_nothing_is_lost_or_repeated(sizes, batch, data):
    shares = data.draw(st.lists(st.integers(1, 9), min_size=len(sizes), max_size=len(sizes)))
    found = replay(lambda: order_of(sizes, shares), sum(sizes), 12, batch)
    assert (found.lost, found.repeated, found.different) == (0, 0, 0)
    assert found.schedules == 12 and found.exact
    assert found.interruptions >= 24 and found.batches > found.interruptions


def test_schedules_visit_ranks_and_deliver_rows():
    found = replay(lambda: order_of([50]), schedules=200)
    assert found.rows > 200 * 6
    assert found.interruptions > 2 * 200


def test_whole_epochs():
    rows = RowOrder(1000, "hash", 1).rows
    for epoch in (0, 5):
        found = check_epoch(rows, 1000, name="a", epoch=epoch)
        assert (found.missing, found.repeated) == (0, 0)


class Buffered(MixedOrder):
    """Forgets at each start what it had drawn ahead, as a shuffle buffer does."""

    def __init__(self, orders, shares):
        super().__init__(orders, shares)
        self.ahead = 0

    def draw(self, first, count):
        self.ahead += 1
        return super().draw(first + self.ahead // 8, count)


def test_a_shuffle_buffer_is_caught():
    found = replay(lambda: Buffered([RowOrder(50, "hash", 0)], [1]))
    assert found.lost > 0 and found.repeated > 0 and found.different > 0
    assert not found.exact


def test_a_rank_share_without_the_remainder_is_caught(monkeypatch):
    original = RowStream.__init__

    def floor_share(self, *args, global_batch_size, rank, world_size, cursor):
        original(
            self,
            *args,
            global_batch_size=global_batch_size,
            rank=rank,
            world_size=world_size,
            cursor=cursor,
        )
        self._count = global_batch_size // world_size
        self._first = rank * self._count

    monkeypatch.setattr(RowStream, "__init__", floor_share)
    found = replay(lambda: order_of([50]))
    assert found.lost > 0 and found.different > 0


def test_a_cursor_that_counts_one_rank_is_caught(monkeypatch):
    original = RowStream.__next__

    def local(self):
        before = self.cursor
        share = original(self)
        self.cursor = before + max(1, len(share.row_ids))
        return share

    monkeypatch.setattr(RowStream, "__next__", local)
    found = replay(lambda: order_of([50]))
    assert not found.exact


@pytest.mark.parametrize(
    ("broken", "missing", "repeated"),
    [
        (lambda rows: np.where(rows == 7, 8, rows), 1, 1),
        (lambda rows: rows // 2, 500, 500),
        (lambda rows: rows[:-1], 1, 0),
    ],
)
def test_an_order_that_is_no_permutation_is_caught(broken, missing, repeated):
    good = RowOrder(1000, "hash", 1)
    found = check_epoch(
        lambda first, count: broken(good.rows(first, count)), 1000, name="a", epoch=0
    )
    assert (found.missing, found.repeated) == (missing, repeated)

"""The order of rows is a permutation, depends on its key, and looks random."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forgetscale.data.order import Permutation, RowOrder


@settings(deadline=None)
@given(size=st.integers(1, 3000), key=st.text(max_size=8))
def test_every_element_once(size, key):
    assert sorted(Permutation(size, key)(np.arange(size))) == list(range(size))


def test_order_is_fixed_for_ever():
    assert Permutation(10, "a")(np.arange(10)).tolist() == ORDER_OF_10
    assert RowOrder(10, "00ff", 7).rows(8, 5).tolist() == ROWS_8_TO_12


def test_small_permutations_are_equally_likely():
    counts = Counter(tuple(Permutation(4, str(key))(np.arange(4))) for key in range(4800))
    assert set(counts) == set(itertools.permutations(range(4)))
    chi_square = sum((count - 200) ** 2 / 200 for count in counts.values())
    assert chi_square < 60, "23 degrees of freedom: 60 is beyond 1 in 10,000"


def test_neighbours_are_scattered():
    order = Permutation(100_000, "x")(np.arange(100_000))
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(order, np.arange(100_000))[0, 1]) < 0.02


def test_epochs_and_seeds_differ():
    order = RowOrder(1000, "hash", 1)
    first, second = order.rows(0, 1000), order.rows(1000, 1000)
    assert sorted(first) == sorted(second) == list(range(1000))
    assert first.tolist() != second.tolist()
    assert RowOrder(1000, "hash", 2).rows(0, 1000).tolist() != first.tolist()
    assert RowOrder(1000, "other", 1).rows(0, 1000).tolist() != first.tolist()


def test_any_window_equals_the_whole():
    order = RowOrder(70_000, "hash", 1)
    whole = order.rows(0, 150_000)
    for first, count in ((0, 1), (65_530, 20), (69_990, 30), (139_999, 2), (5, 0)):
        assert order.rows(first, count).tolist() == whole[first : first + count].tolist()


def test_impossible_size():
    with pytest.raises(ValueError, match="size must be"):
        Permutation(0, "a")


ORDER_OF_10 = [1, 4, 2, 5, 8, 7, 3, 6, 0, 9]
ROWS_8_TO_12 = [4, 3, 7, 5, 2]

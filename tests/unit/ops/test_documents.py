"""Positions and labels of packed rows."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from forgetscale.ops import IGNORE_INDEX
from forgetscale.ops.documents import document_positions, packed_labels


def test_worked_example():
    lens = torch.tensor([[3, 1, 2], [4, 4, 0]])
    assert document_positions(lens, 8).tolist() == [
        [0, 1, 2, 0, 0, 1, 0, 1],
        [0, 1, 2, 3, 0, 1, 2, 3],
    ]
    ids = torch.arange(16).view(2, 8)
    none = IGNORE_INDEX
    assert packed_labels(ids, lens, document_mask=False).tolist() == [
        [0, 1, 2, 3, 4, 5, none, none],
        list(range(8, 16)),
    ]
    assert packed_labels(ids, lens, document_mask=True).tolist() == [
        [none, 1, 2, none, none, 5, none, none],
        [none, 9, 10, 11, none, 13, 14, 15],
    ]


@given(st.lists(st.lists(st.integers(1, 5), max_size=5), min_size=1, max_size=4), st.integers(0, 3))
def test_against_a_plain_loop(rows, spare):
    size = max(map(sum, rows)) + spare
    lens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    for index, row in enumerate(rows):
        lens[index, : len(row)] = torch.tensor(row)
    expected = []
    for row in rows:
        places = [place for length in row for place in range(length)]
        expected.append(places + list(range(size - len(places))))
    assert document_positions(lens, size).tolist() == expected
    labels = packed_labels(torch.ones(len(rows), size, dtype=torch.int64), lens, document_mask=True)
    assert (labels != IGNORE_INDEX).sum(1).tolist() == [sum(row) - len(row) for row in rows]


@pytest.mark.parametrize("lens", [[[3, 3]], [[4, -1]]])
def test_impossible_lengths_are_refused(lens):
    with pytest.raises(ValueError, match="sum to at most 5"):
        document_positions(torch.tensor(lens), 5)

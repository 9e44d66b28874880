"""Cutting a rank's rows into equal micro-batches."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from forgetscale.data import calibration_rows
from forgetscale.engine.micro_batches import micro_batches
from forgetscale.ops import IGNORE_INDEX


@given(st.integers(0, 9), st.integers(1, 5), st.integers(0, 3))
def test_every_row_once_and_fillers_without_target(rows: int, size: int, spare: int):
    ids = torch.arange(rows * 4).view(rows, 4) + 1
    count = -(-rows // size) + spare
    found = list(micro_batches(ids, size, count))
    assert len(found) == count
    real = []
    for input_ids, labels, positions, extra in found:
        assert positions is None and extra == {}
        assert input_ids.shape == labels.shape == (size, 4)
        is_real = (labels != IGNORE_INDEX).all(1)
        assert torch.equal(input_ids[is_real], labels[is_real])
        assert (labels[~is_real] == IGNORE_INDEX).all() and (input_ids[~is_real] == 0).all()
        real.append(input_ids[is_real])
    assert torch.equal(torch.cat(real) if real else ids, ids)


def test_too_many_rows_are_never_dropped():
    with pytest.raises(AssertionError):
        list(micro_batches(torch.zeros(5, 3, dtype=torch.int64), 2, 2))


@pytest.mark.parametrize(
    ("total", "stride", "last", "count"),
    [(1200, 2, 998, 500), (900, 1, 499, 500), (1700, 3, 1497, 500), (300, 1, 299, 300)],
)
def test_calibration_stride(total: int, stride: int, last: int, count: int):
    rows = calibration_rows(total, 500)
    assert len(rows) == count and rows[-1] == last
    assert all(b - a == stride for a, b in zip(rows, rows[1:], strict=False))

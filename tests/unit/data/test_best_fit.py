"""Best-fit packing against the plain algorithm; nothing lost, only long documents cut."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forgetscale.data import BestFitPacker, best_fit_rows

PAD = 65535


def plain_best_fit(lens, capacity):
    """Best-fit decreasing as written in a textbook, one chunk at a time."""
    free = []
    for length in sorted(lens, reverse=True):
        fitting = [(space, row) for row, space in enumerate(free) if space >= length]
        if fitting:
            free[min(fitting)[1]] -= length
        else:
            free.append(capacity - length)
    return sorted(free)


@given(st.integers(1, 40).flatmap(lambda c: st.tuples(st.just(c), st.lists(st.integers(1, c)))))
def test_fills_rows_as_the_textbook_does(case):
    capacity, lens = case
    rows = best_fit_rows(np.array(lens, dtype=np.int64), capacity)
    assert sorted(set(rows.tolist())) == list(range(len(set(rows.tolist()))))
    used = np.bincount(rows, weights=lens) if lens else np.empty(0)
    assert sorted((capacity - used).astype(int).tolist()) == plain_best_fit(lens, capacity)


def test_worked_example():
    # 6 and 4 fill a row, 5 and 5 another; 3 joins 7; 2 opens the last one.
    lens = np.array([4, 5, 2, 7, 5, 6, 3])
    rows = best_fit_rows(lens, 10)
    together = {tuple(sorted(lens[rows == row].tolist())) for row in set(rows.tolist())}
    assert together == {(3, 7), (4, 6), (5, 5), (2,)}


def test_impossible_lengths_are_refused():
    for lens in ([0, 3], [11]):
        with pytest.raises(ValueError, match=r"must lie in 1\.\.10"):
            best_fit_rows(np.array(lens), 10)


def test_many_documents_are_packed_quickly():
    lens = np.random.default_rng(0).integers(1, 513, 100_000)
    start = time.perf_counter()
    rows = best_fit_rows(lens, 512)
    assert time.perf_counter() - start < 2
    assert lens.sum() / ((rows.max() + 1) * 512) > 0.99


def pack(documents, block_size, rows_per_batch, window, split_at):
    packer = BestFitPacker(
        block_size, rows_per_batch, np.dtype(np.uint16), pad_id=PAD, window_tokens=window
    )
    groups = []
    for part, first in ((documents[:split_at], 0), (documents[split_at:], split_at)):
        if part:
            groups += packer.add(
                np.concatenate(part),
                np.array([len(document) for document in part]),
                np.arange(first, first + len(part), dtype=np.uint64),
            )
    assert all(len(group) == rows_per_batch for group in groups)
    rest = packer.finish()
    assert all(len(group) == rows_per_batch for group in rest[:-1])
    groups += rest
    rows = []
    for group in groups:
        for index, row in enumerate(group.input_ids):
            first, last = group.piece_offsets[index : index + 2]
            lens, ids = group.doc_lens[first:last].tolist(), group.doc_id[first:last].tolist()
            rows.append((row.tolist(), lens, ids))
    return rows, packer


@given(
    lengths=st.lists(st.integers(1, 23), min_size=1, max_size=30),
    block_size=st.integers(1, 9),
    rows_per_batch=st.integers(1, 4),
    window=st.integers(1, 60),
    split_at=st.integers(0, 30),
)
def test_every_token_once_and_only_long_documents_cut(
    lengths, block_size, rows_per_batch, window, split_at
):
    ends = np.cumsum(lengths)
    documents = [
        np.arange(end - n, end, dtype=np.uint32) for n, end in zip(lengths, ends, strict=True)
    ]
    rows, packer = pack(documents, block_size, rows_per_batch, window, split_at)
    seen, padding, rows_of = [], 0, [set() for _ in lengths]
    for number, (row, lens, ids) in enumerate(rows):
        assert min(lens) >= 1 and sum(lens) <= block_size == len(row)
        assert ids == sorted(ids)
        place = 0
        for length, document in zip(lens, ids, strict=True):
            piece = row[place : place + length]
            assert piece == list(range(piece[0], piece[0] + length))
            assert set(piece) <= set(documents[document].tolist())
            seen += piece
            rows_of[document].add(number)
            place += length
        assert row[place:] == [PAD] * (block_size - place)
        padding += block_size - place
    assert sorted(seen) == list(range(int(ends[-1])))
    cut = [len(found) > 1 for found in rows_of]
    assert cut == [length > block_size for length in lengths]
    assert packer.num_cut_documents == sum(cut)
    assert packer.num_padding_tokens == padding
    assert packer.num_pieces == sum(len(ids) for _, _, ids in rows)
    assert packer.dropped_tail_tokens == 0
    again, _ = pack(documents, block_size, rows_per_batch, window, 30 - split_at)
    assert again == rows

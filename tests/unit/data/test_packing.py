"""Concatenate-and-cut packing: nothing lost, nothing moved, lengths right."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forgetscale.data import ConcatPacker


def pack(documents, block_size, rows_per_batch, split_at):
    """Feed documents in two parts; return rows and (lens, ids) of the pieces of each row."""
    packer = ConcatPacker(block_size, rows_per_batch, np.dtype(np.uint16))
    groups = []
    for part, first in ((documents[:split_at], 0), (documents[split_at:], split_at)):
        if part:
            groups += packer.add(
                np.concatenate(part),
                np.array([len(document) for document in part]),
                np.arange(first, first + len(part), dtype=np.uint64),
            )
    assert all(len(group) == rows_per_batch for group in groups)
    for rest in packer.finish():
        assert len(rest) < rows_per_batch
        groups.append(rest)
    rows, pieces = [], []
    for group in groups:
        for index, row in enumerate(group.input_ids):
            first, last = group.piece_offsets[index : index + 2]
            rows.append(row.tolist())
            pieces.append((group.doc_lens[first:last].tolist(), group.doc_id[first:last].tolist()))
    return rows, pieces, packer


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 23), min_size=1, max_size=30),
    block_size=st.integers(1, 9),
    rows_per_batch=st.integers(1, 4),
    split_at=st.integers(0, 30),
)
def test_rows_are_the_documents_one_after_another(lengths, block_size, rows_per_batch, split_at):
    ends = np.cumsum(lengths)
    documents = [
        np.arange(end - n, end, dtype=np.uint32) for n, end in zip(lengths, ends, strict=True)
    ]
    rows, pieces, packer = pack(documents, block_size, rows_per_batch, split_at)
    dropped = packer.dropped_tail_tokens
    flat = [token for row in rows for token in row]
    assert flat == list(range(len(flat)))
    assert dropped == ends[-1] - len(flat) < block_size
    seen = np.zeros(len(lengths), dtype=int)
    position = 0
    for row_lens, row_ids in pieces:
        assert sum(row_lens) == block_size
        for length, document in zip(row_lens, row_ids, strict=True):
            assert length >= 1
            assert np.searchsorted(ends, position, side="right") == document
            seen[document] += length
            position += length
    assert (seen <= lengths).all()
    assert seen.sum() == len(flat)
    assert packer.num_pieces == sum(len(ids) for _, ids in pieces)
    assert packer.num_padding_tokens == 0
    borders = set(range(block_size, len(flat) + 1, block_size))
    starts = ends - lengths
    cut = [any(a < b < e for b in borders) for a, e in zip(starts, ends, strict=True)]
    assert packer.num_cut_documents == sum(cut)


def test_wrong_lengths_are_refused():
    packer = ConcatPacker(4, 2, np.dtype(np.uint16))
    for lens in ([2, 2], [3, 0]):
        with pytest.raises(ValueError, match="sum to 3 tokens"):
            packer.add(np.arange(3), np.array(lens), np.arange(2, dtype=np.uint64))

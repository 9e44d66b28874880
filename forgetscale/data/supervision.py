"""Loss masks of SFT rows: one bit beside each id while rows are packed, run lengths when stored.

While documents go through a packer, the highest bit of an id says that the token is supervised, so
that every way of packing serves SFT rows unchanged. Stored, the mask of a row is a list of run
lengths: tokens that are not supervised, tokens that are, and so on, beginning with the first kind
(0 where the row begins supervised, which no row does) and ending with the last supervised run.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32, Integer, UInt32

from forgetscale.data.format import PackedRows

MAX_VOCAB_SIZE = 1 << 31
"""Ids of SFT rows are below this number."""
_BIT = np.uint32(1 << 31)


def mark_supervised(
    tokens: Integer[np.ndarray, " tokens"], supervised: Bool[np.ndarray, " tokens"]
) -> UInt32[np.ndarray, " tokens"]:
    """Return ids with the mark of supervised tokens in their highest bit.

    Raises:
        ValueError: An id is not below ``MAX_VOCAB_SIZE``.
    """
    if len(tokens) and int(tokens.max()) >= MAX_VOCAB_SIZE:
        raise ValueError(f"ids of SFT rows must be below {MAX_VOCAB_SIZE}, got {int(tokens.max())}")
    marked: np.ndarray = tokens.astype(np.uint32) | np.where(supervised, _BIT, np.uint32(0))
    return marked


def split_marked(rows: PackedRows, dtype: np.dtype[Any]) -> PackedRows:
    """Return packed rows of marked ids as rows of plain ids with loss masks.

    The first token of each document piece loses its mark: nothing of its document stands before it
    in the row, so no way of reading the row has a prediction for it. Every token that keeps the
    mark is a target, with and without document masks.

    Args:
        rows: Rows whose ids ``mark_supervised`` made.
        dtype: Type of the plain ids.
    """
    ids = rows.input_ids.astype(np.uint32, copy=False)
    supervised = ids >= _BIT
    lens = rows.doc_lens.astype(np.int64)
    first_pieces = rows.piece_offsets[:-1].astype(np.int64)
    before = np.cumsum(lens) - lens
    counts = np.diff(rows.piece_offsets)
    row_of_piece = np.repeat(np.arange(len(ids)), counts)
    supervised[row_of_piece, before - np.repeat(before[first_pieces], counts)] = False
    runs, offsets = mask_to_runs(supervised)
    plain = (ids & ~_BIT).astype(dtype)
    return replace(rows, input_ids=plain, loss_mask=runs, mask_offsets=offsets)


def mask_to_runs(
    mask: Bool[np.ndarray, "rows block"],
) -> tuple[UInt32[np.ndarray, " runs"], Int32[np.ndarray, " rows_plus_1"]]:
    """Return the run lengths of all rows, one after another, and where each row's begin."""
    num_rows, size = mask.shape
    edges = np.zeros((num_rows, size + 2), dtype=np.int8)
    edges[:, 1:-1] = mask
    changes = np.diff(edges, axis=1) != 0
    rows, places = np.nonzero(changes)
    counts = np.bincount(rows, minlength=num_rows)
    starts = np.diff(places, prepend=0)
    is_first = np.diff(rows, prepend=-1) != 0
    runs = np.where(is_first, places, starts).astype(np.uint32)
    return runs, np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)


def runs_to_mask(
    runs: Integer[np.ndarray, " runs"], offsets: Integer[np.ndarray, " rows_plus_1"], size: int
) -> Bool[np.ndarray, "rows size"]:
    """Return the mask that ``mask_to_runs`` was given.

    Args:
        runs: Run lengths of all rows; those of a row sum to at most ``size``.
        offsets: Where each row's begin, and the end of the last.
        size: Tokens a row.
    """
    num_rows = len(offsets) - 1
    mask = np.zeros((num_rows, size), dtype=bool)
    for row in range(num_rows):
        ends = np.cumsum(runs[offsets[row] : offsets[row + 1]], dtype=np.int64)
        for start, end in zip(ends[0::2].tolist(), ends[1::2].tolist(), strict=True):
            mask[row, start:end] = True
    return mask

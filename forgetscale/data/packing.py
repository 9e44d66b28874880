"""Packing of documents into rows of equal length. Pure: arrays in, arrays out."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Integer, UInt64

from forgetscale.data.format import PackedRows

CONCAT_VERSION = 1


def cut_rows(
    tokens: np.ndarray,
    doc_lens: np.ndarray,
    doc_ids: np.ndarray,
    *,
    num_rows: int,
    block_size: int,
) -> PackedRows:
    """Cut the first ``num_rows * block_size`` tokens into rows and say which documents they hold.

    Args:
        tokens: ``[tokens]`` ids of all documents, one after another, at least enough for the rows.
        doc_lens: ``[documents]`` tokens of each document, each at least 1.
        doc_ids: ``[documents]`` uint64 id of each document.
        num_rows: Rows to cut.
        block_size: Tokens a row.
    """
    ends = np.cumsum(doc_lens, dtype=np.int64)
    row_ends = np.arange(1, num_rows + 1, dtype=np.int64) * block_size
    piece_ends = np.union1d(ends[ends < num_rows * block_size], row_ends)
    piece_starts = np.concatenate([np.zeros(1, np.int64), piece_ends[:-1]])[: len(piece_ends)]
    last_pieces = np.searchsorted(piece_ends, row_ends) + 1
    return PackedRows(
        input_ids=tokens[: num_rows * block_size].reshape(num_rows, block_size),
        doc_lens=(piece_ends - piece_starts).astype(np.uint32),
        doc_id=np.asarray(doc_ids, np.uint64)[np.searchsorted(ends, piece_starts, side="right")],
        piece_offsets=np.concatenate([[0], last_pieces]).astype(np.int32),
    )


class ConcatPacker:
    """Concatenate documents in order and cut every ``block_size`` tokens.

    The result depends on the documents and their order alone, not on how they arrive: rows come
    out in groups of exactly ``rows_per_batch``, the rest at ``finish``. A tail shorter than one row
    is dropped and counted in ``dropped_tail_tokens``.

    Args:
        block_size: Tokens a row, >= 1.
        rows_per_batch: Rows a group, >= 1.
        dtype: Type of the ids, uint16 or uint32.
    """

    def __init__(self, block_size: int, rows_per_batch: int, dtype: np.dtype[Any]) -> None:
        self.block_size = block_size
        self.rows_per_batch = rows_per_batch
        self.dropped_tail_tokens = 0
        self._dtype = dtype
        self._tokens: list[np.ndarray] = []
        self._doc_lens: list[np.ndarray] = []
        self._doc_ids: list[np.ndarray] = []
        self._num_tokens = 0

    def add(
        self,
        tokens: Integer[np.ndarray, " tokens"],
        doc_lens: Integer[np.ndarray, " documents"],
        doc_ids: UInt64[np.ndarray, " documents"],
    ) -> list[PackedRows]:
        """Take some whole documents; return the full groups of rows that are now ready.

        Raises:
            ValueError: A document is empty, or lengths do not sum to the number of tokens.
        """
        if len(doc_lens) and (int(doc_lens.min()) < 1 or int(doc_lens.sum()) != len(tokens)):
            raise ValueError(
                f"document lengths must be >= 1 and sum to {len(tokens)} tokens, got a sum of"
                f" {int(doc_lens.sum())} and a least length of {int(doc_lens.min())}"
            )
        self._tokens.append(tokens.astype(self._dtype, copy=False))
        self._doc_lens.append(doc_lens.astype(np.int64, copy=False))
        self._doc_ids.append(doc_ids)
        self._num_tokens += len(tokens)
        groups = []
        while self._num_tokens >= self.rows_per_batch * self.block_size:
            groups.append(self._take(self.rows_per_batch))
        return groups

    def finish(self) -> PackedRows | None:
        """Return the last, smaller group of rows, if any, and count the tail that is dropped."""
        num_rows = self._num_tokens // self.block_size
        rows = self._take(num_rows) if num_rows else None
        self.dropped_tail_tokens = self._num_tokens
        return rows

    def _take(self, num_rows: int) -> PackedRows:
        tokens = np.concatenate(self._tokens)
        lens = np.concatenate(self._doc_lens)
        ids = np.concatenate(self._doc_ids)
        rows = cut_rows(tokens, lens, ids, num_rows=num_rows, block_size=self.block_size)
        taken = num_rows * self.block_size
        ends = np.cumsum(lens)
        first = int(np.searchsorted(ends, taken, side="right"))
        rest = lens[first:].copy()
        if len(rest):
            rest[0] = ends[first] - taken
        self._tokens, self._doc_lens, self._doc_ids = [tokens[taken:]], [rest], [ids[first:]]
        self._num_tokens -= taken
        return rows

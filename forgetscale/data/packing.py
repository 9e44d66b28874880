"""Packing of documents into rows of equal length. Pure: arrays in, arrays out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Int64, Integer, UInt64

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


def slice_rows(rows: PackedRows, start: int, end: int) -> PackedRows:
    """Return rows ``start`` to ``end - 1`` with their pieces."""
    first, last = int(rows.piece_offsets[start]), int(rows.piece_offsets[end])
    return PackedRows(
        input_ids=rows.input_ids[start:end],
        doc_lens=rows.doc_lens[first:last],
        doc_id=rows.doc_id[first:last],
        piece_offsets=rows.piece_offsets[start : end + 1] - np.int32(first),
    )


def join_rows(parts: Sequence[PackedRows]) -> PackedRows:
    """Return the rows of all parts, one after another."""
    counts = [np.diff(part.piece_offsets) for part in parts]
    return PackedRows(
        input_ids=np.concatenate([part.input_ids for part in parts]),
        doc_lens=np.concatenate([part.doc_lens for part in parts]),
        doc_id=np.concatenate([part.doc_id for part in parts]),
        piece_offsets=np.cumsum(np.concatenate([[0], *counts])).astype(np.int32),
    )


class Packer(ABC):
    """Documents in, groups of rows out; what all ways of packing share.

    The result depends on the documents and their order alone, not on how they arrive: rows come
    out in groups of exactly ``rows_per_batch``, the rest at ``finish``.

    Args:
        block_size: Tokens a row, >= 1.
        rows_per_batch: Rows a group, >= 1.
        dtype: Type of the ids, uint16 or uint32.

    Attributes:
        dropped_tail_tokens: Tokens at the end of the input that stand in no row.
        num_cut_documents: Documents that stand in more than one row.
        num_pieces: Document pieces in all rows.
        num_padding_tokens: Padding in all rows.
    """

    METHOD: ClassVar[str]
    VERSION: ClassVar[int]

    def __init__(self, block_size: int, rows_per_batch: int, dtype: np.dtype[Any]) -> None:
        self.block_size = block_size
        self.rows_per_batch = rows_per_batch
        self.dropped_tail_tokens = 0
        self.num_cut_documents = 0
        self.num_pieces = 0
        self.num_padding_tokens = 0
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
        ids = tokens.astype(self._dtype, copy=False)
        return self._take_documents(ids, doc_lens.astype(np.int64, copy=False), doc_ids)

    @abstractmethod
    def finish(self) -> list[PackedRows]:
        """Return the rows that are left, in groups; the last group may be smaller."""

    @abstractmethod
    def _take_documents(
        self,
        tokens: Integer[np.ndarray, " tokens"],
        doc_lens: Int64[np.ndarray, " documents"],
        doc_ids: UInt64[np.ndarray, " documents"],
    ) -> list[PackedRows]: ...

    def _keep(self, tokens: np.ndarray, doc_lens: np.ndarray, doc_ids: np.ndarray) -> None:
        self._tokens.append(tokens)
        self._doc_lens.append(doc_lens)
        self._doc_ids.append(doc_ids)
        self._num_tokens += len(tokens)

    def _release(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return all documents that are held as (tokens, lengths, ids) and hold none."""
        parts = self._tokens, self._doc_lens, self._doc_ids
        self._tokens, self._doc_lens, self._doc_ids, self._num_tokens = [], [], [], 0
        return tuple(np.concatenate(part) for part in parts)  # type: ignore[return-value]


class ConcatPacker(Packer):
    """Concatenate documents in order and cut every ``block_size`` tokens.

    A tail shorter than one row is dropped and counted in ``dropped_tail_tokens``. There is no
    padding. Arguments and attributes are those of ``Packer``.
    """

    METHOD, VERSION = "concat", CONCAT_VERSION

    def __init__(self, block_size: int, rows_per_batch: int, dtype: np.dtype[Any]) -> None:
        super().__init__(block_size, rows_per_batch, dtype)
        self._first_is_rest = False

    def _take_documents(
        self,
        tokens: Integer[np.ndarray, " tokens"],
        doc_lens: Int64[np.ndarray, " documents"],
        doc_ids: UInt64[np.ndarray, " documents"],
    ) -> list[PackedRows]:
        self._keep(tokens, doc_lens, doc_ids)
        groups = []
        while self._num_tokens >= self.rows_per_batch * self.block_size:
            groups.append(self._take(self.rows_per_batch))
        return groups

    def finish(self) -> list[PackedRows]:
        """Return the last, smaller group of rows, if any, and count the tail that is dropped."""
        num_rows = self._num_tokens // self.block_size
        rows = [self._take(num_rows)] if num_rows else []
        self.dropped_tail_tokens = self._num_tokens
        return rows

    def _take(self, num_rows: int) -> PackedRows:
        tokens, lens, ids = self._release()
        rows = cut_rows(tokens, lens, ids, num_rows=num_rows, block_size=self.block_size)
        taken = num_rows * self.block_size
        ends = np.cumsum(lens)
        first = int(np.searchsorted(ends, taken, side="right"))
        self._count(lens, ends, taken)
        rest = lens[first:].copy()
        if len(rest):
            rest[0] = ends[first] - taken
            self._first_is_rest = rest[0] < lens[first]
        else:
            self._first_is_rest = False
        self._keep(tokens[taken:], rest, ids[first:])
        self.num_pieces += len(rows.doc_lens)
        return rows

    def _count(self, lens: np.ndarray, ends: np.ndarray, taken: int) -> None:
        """Count the documents cut by a border up to ``taken``, each once."""
        starts = ends - lens
        is_cut = (starts // self.block_size < (ends - 1) // self.block_size) & (starts < taken)
        if self._first_is_rest and len(is_cut):
            is_cut[0] = False  # counted when its beginning was taken
        self.num_cut_documents += int(is_cut.sum())


class OnePerRowPacker(Packer):
    """Put each document into a row of its own; the rest of the row is padding.

    Args:
        block_size: Tokens a row, >= 1.
        rows_per_batch: Rows a group, >= 1.
        dtype: Type of the ids, uint16 or uint32.
        pad_id: Id written into padding; it is never a target.
    """

    METHOD, VERSION = "none", 1

    def __init__(
        self, block_size: int, rows_per_batch: int, dtype: np.dtype[Any], *, pad_id: int
    ) -> None:
        super().__init__(block_size, rows_per_batch, dtype)
        self.pad_id = pad_id
        self._num_held = 0

    def _take_documents(
        self,
        tokens: Integer[np.ndarray, " tokens"],
        doc_lens: Int64[np.ndarray, " documents"],
        doc_ids: UInt64[np.ndarray, " documents"],
    ) -> list[PackedRows]:
        if len(doc_lens) and int(doc_lens.max()) > self.block_size:
            raise ValueError(
                f"a document of {int(doc_lens.max())} tokens does not fit a row of"
                f" {self.block_size}"
            )
        self._keep(tokens, doc_lens, doc_ids)
        self._num_held += len(doc_lens)
        groups = []
        while self._num_held >= self.rows_per_batch:
            groups.append(self._fill(self.rows_per_batch))
        return groups

    def finish(self) -> list[PackedRows]:
        """Return the last, smaller group of rows, if any."""
        return [self._fill(self._num_held)] if self._num_held else []

    def _fill(self, num_rows: int) -> PackedRows:
        tokens, lens, ids = self._release()
        size = int(lens[:num_rows].sum())
        self._keep(tokens[size:], lens[num_rows:], ids[num_rows:])
        self._num_held -= num_rows
        rows = np.full((num_rows, self.block_size), self.pad_id, dtype=self._dtype)
        rows[np.arange(self.block_size) < lens[:num_rows, None]] = tokens[:size]
        self.num_pieces += num_rows
        self.num_padding_tokens += rows.size - size
        return PackedRows(
            input_ids=rows,
            doc_lens=lens[:num_rows].astype(np.uint32),
            doc_id=np.asarray(ids[:num_rows], np.uint64),
            piece_offsets=np.arange(num_rows + 1, dtype=np.int32),
        )

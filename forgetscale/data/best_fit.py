"""Best-fit packing: only documents longer than a row are cut. Pure: arrays in, arrays out."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Int64, Integer, UInt64

from forgetscale.data.format import PackedRows
from forgetscale.data.packing import Packer, join_rows, slice_rows

BEST_FIT_VERSION = 1
WINDOW_TOKENS = 1 << 24


def best_fit_rows(
    lens: Integer[np.ndarray, " chunks"], capacity: int
) -> Int64[np.ndarray, " chunks"]:
    """Assign chunks to rows by best-fit decreasing: longest first, each into the fullest row.

    Rows with the same free space are the same to the algorithm, and so are chunks of the same
    length; both are handled as groups. A row of the tightest group that can take the current
    length takes as many of them as fit, because after the first it is the tightest. The work
    is ``O(chunks + pairs of length and free space met)``, at most ``capacity`` lengths.

    Args:
        lens: Tokens of each chunk, each in 1..``capacity``.
        capacity: Tokens a row.

    Returns:
        ``[chunks]`` row of each chunk; rows are numbered from 0 in the order they are opened.

    Raises:
        ValueError: A length is outside 1..``capacity``.

    Source:
        arXiv:2404.10830, section 3 (Best-fit Packing). The paper finds the row with a segment
        tree in ``O(chunks log capacity)``; grouping gives the same rows.
    """
    if len(lens) and not 1 <= int(lens.min()) <= int(lens.max()) <= capacity:
        raise ValueError(
            f"chunk lengths must lie in 1..{capacity}, got {int(lens.min())} to {int(lens.max())}"
        )
    order = np.argsort(-lens.astype(np.int64), kind="stable")
    rows = np.empty(len(lens), dtype=np.int64)
    lengths, counts = np.unique(lens, return_counts=True)
    open_rows: dict[int, list[np.ndarray]] = {}
    free_spaces = 0  # bit ``f`` is set while a row with ``f`` free tokens is open
    num_rows = taken = 0
    for length, count in zip(lengths[::-1].tolist(), counts[::-1].tolist(), strict=True):
        chunks = order[taken : taken + count]
        taken += count
        while len(chunks):
            fitting = free_spaces >> length
            if fitting:
                space = length + (fitting & -fitting).bit_length() - 1
                candidates = np.concatenate(open_rows.pop(space))
                free_spaces ^= 1 << space
            else:
                space = capacity
                needed = -(-len(chunks) // (capacity // length))
                candidates = np.arange(num_rows, num_rows + needed)
                num_rows += needed
            each = space // length
            used = min(len(candidates), -(-len(chunks) // each))
            placed = chunks[: used * each]
            chunks = chunks[len(placed) :]
            rows[placed] = np.repeat(candidates[:used], each)[: len(placed)]
            last = len(placed) - (used - 1) * each  # the last row may take fewer
            for group, left in (
                (candidates[: used - 1], space - each * length),
                (candidates[used - 1 : used], space - last * length),
                (candidates[used:], space),
            ):
                if len(group) and left:
                    open_rows.setdefault(left, []).append(group)
                    free_spaces |= 1 << left
    return rows


class BestFitPacker(Packer):
    """Pack whole documents into rows; the space left at the end of a row is padding.

    A document longer than a row is cut into full rows and a rest, and the rest is packed like a
    document. Packing is done in windows of whole documents that hold at least ``window_tokens``,
    so memory is bounded and the result depends on the documents and their order alone, not on how
    they arrive. No token is dropped. Rows stand in the order of their first document.

    Args:
        block_size: Tokens a row, >= 1.
        rows_per_batch: Rows a group, >= 1.
        dtype: Type of the ids, uint16 or uint32.
        pad_id: Id written into padding; it is never a target.
        window_tokens: Least tokens packed together, >= 1.
    """

    METHOD, VERSION = "best_fit", BEST_FIT_VERSION

    def __init__(
        self,
        block_size: int,
        rows_per_batch: int,
        dtype: np.dtype[Any],
        *,
        pad_id: int,
        window_tokens: int = WINDOW_TOKENS,
    ) -> None:
        super().__init__(block_size, rows_per_batch, dtype)
        self.pad_id = pad_id
        self._window_tokens = window_tokens
        self._ready: PackedRows | None = None

    def _take_documents(
        self,
        tokens: Integer[np.ndarray, " tokens"],
        doc_lens: Int64[np.ndarray, " documents"],
        doc_ids: UInt64[np.ndarray, " documents"],
    ) -> list[PackedRows]:
        groups: list[PackedRows] = []
        ends = np.cumsum(doc_lens)
        first = start = 0
        while first < len(doc_lens):
            wanted = start + self._window_tokens - self._num_tokens
            last = min(int(np.searchsorted(ends, wanted)) + 1, len(doc_lens))
            end = int(ends[last - 1])
            self._keep(tokens[start:end], doc_lens[first:last], doc_ids[first:last])
            if self._num_tokens >= self._window_tokens:
                groups += self._pack_window()
            first, start = last, end
        return groups

    def finish(self) -> list[PackedRows]:
        """Pack the last window; return all rows that are left, the last group may be smaller."""
        groups = self._pack_window() if self._num_tokens else []
        if self._ready is not None and len(self._ready):
            groups.append(self._ready)
        self._ready = None
        return groups

    def _pack_window(self) -> list[PackedRows]:
        """Pack the documents that are held; return full groups and keep the rest."""
        rows = self._fill(*self._release())
        if self._ready is not None:
            rows = join_rows([self._ready, rows])
        step = self.rows_per_batch
        num_full = len(rows) // step * step
        self._ready = slice_rows(rows, num_full, len(rows))
        return [slice_rows(rows, first, first + step) for first in range(0, num_full, step)]

    def _fill(
        self,
        tokens: Integer[np.ndarray, " tokens"],
        doc_lens: Int64[np.ndarray, " documents"],
        doc_ids: UInt64[np.ndarray, " documents"],
    ) -> PackedRows:
        size = self.block_size
        num_chunks = -(-doc_lens // size)
        documents = np.repeat(np.arange(len(doc_lens)), num_chunks)
        part = np.arange(len(documents)) - np.repeat(np.cumsum(num_chunks) - num_chunks, num_chunks)
        lens = np.minimum(size, doc_lens[documents] - part * size)
        starts = (np.cumsum(doc_lens) - doc_lens)[documents] + part * size
        rows = best_fit_rows(lens, size)
        # A stable sort keeps documents in their order inside a row.
        _, firsts, rows = np.unique(rows, return_index=True, return_inverse=True)
        rows = np.argsort(np.argsort(firsts))[rows]
        order = np.argsort(rows, kind="stable")
        num_rows = len(firsts)
        piece_offsets = np.searchsorted(rows[order], np.arange(num_rows + 1)).astype(np.int32)
        input_ids = np.full((num_rows, size), self.pad_id, dtype=self._dtype)
        row, place = -1, 0
        for chunk in order.tolist():
            if rows[chunk] != row:
                row, place = int(rows[chunk]), 0
            start, length = int(starts[chunk]), int(lens[chunk])
            input_ids[row, place : place + length] = tokens[start : start + length]
            place += length
        self.num_cut_documents += int((num_chunks > 1).sum())
        self.num_pieces += len(lens)
        self.num_padding_tokens += num_rows * size - len(tokens)
        return PackedRows(
            input_ids=input_ids,
            doc_lens=lens[order].astype(np.uint32),
            doc_id=doc_ids[documents[order]],
            piece_offsets=piece_offsets,
        )

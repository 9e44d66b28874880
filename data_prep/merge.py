"""Results of units, in input order, to rows of one or two token sets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.engine import Source
from data_prep.ledger import Ledger
from data_prep.units import UnitResult
from forgetscale.data import Packer, ShardWriter
from forgetscale.data.duplicates import is_held_out
from forgetscale.data.format import LINE_BITS, PackedRows
from forgetscale.data.supervision import mark_supervised, split_marked
from forgetscale.errors import DataError
from forgetscale.progress import Progress


class Output:
    """One token set that is being written: rows, and counts of the documents in it.

    Args:
        writer: Writes rows.
        packer: Makes rows.
        num_sources: Input files.
    """

    def __init__(self, writer: ShardWriter, packer: Packer, num_sources: int) -> None:
        self.writer = writer
        self.packer = packer
        self.num_tokens = 0
        self.num_chats = 0
        self.documents = [0] * num_sources
        self._num_text_bytes = 0
        self._tail: list[tuple[int, int]] = []

    @property
    def num_documents(self) -> int:
        """Documents taken."""
        return sum(self.documents)

    def add(self, source: Source, arrays: dict[str, np.ndarray]) -> None:
        """Take documents (arrays as ``UnitTokenizer`` makes them)."""
        lens, sizes = arrays["doc_lens"], arrays["doc_bytes"]
        self.documents[source.index] += len(lens)
        self.num_tokens += len(arrays["tokens"])
        self.num_chats += int(arrays["doc_chat"].sum())
        self._num_text_bytes += int(sizes.sum())
        self._tail += zip(lens.tolist(), sizes.tolist(), strict=True)
        self._forget_all_but_a_row()
        doc_ids = arrays["doc_lines"].astype(np.uint64) | np.uint64(source.index << LINE_BITS)
        tokens = arrays["tokens"]
        if self.writer.supervised:
            tokens = mark_supervised(tokens, arrays["supervised"].astype(bool))
        for rows in self.packer.add(tokens, lens, doc_ids):
            self._write(rows)

    def finish(self, name: Path) -> None:
        """Write the rows that are left.

        Raises:
            DataError: There is not one row.
        """
        for rows in self.packer.finish():
            self._write(rows)
        if self.writer.num_rows == 0:
            raise DataError(
                f"the documents for {name} give {self.num_tokens} tokens, less than one row of"
                f" {self.packer.block_size}; lower --block-size or add input."
            )

    def _write(self, rows: PackedRows) -> None:
        writer = self.writer
        writer.append(split_marked(rows, writer.dtype) if writer.supervised else rows)

    def kept_text(self) -> tuple[int, int]:
        """Return text bytes of what stands in rows, and documents that are wholly dropped.

        The document that is cut by the end of the last row counts in proportion to its tokens.
        """
        num_bytes, num_dropped = self._num_text_bytes, 0
        left = self.packer.dropped_tail_tokens
        for tokens, size in reversed(self._tail):
            if left <= 0:
                break
            part = min(tokens, left)
            num_bytes -= size * part // tokens
            num_dropped += part == tokens
            left -= part
        return num_bytes, num_dropped

    def _forget_all_but_a_row(self) -> None:
        covered = 0
        for index in range(len(self._tail) - 1, -1, -1):
            covered += self._tail[index][0]
            if covered >= self.packer.block_size:
                del self._tail[:index]
                break


class TokenMerger:
    """Join parts of long documents, hold some out, stop at the budget, pack the rest.

    Args:
        outputs: The token set, and a second one for held-out documents.
        ledger: Counts of the input.
        holdout_fraction: Share of documents for the second one; 0: none.
        seed: Seed of that choice.
        max_tokens: No document is taken once the first set has this many tokens; None: no limit.
        progress: Told how many stored bytes were merged.
    """

    def __init__(
        self,
        outputs: Sequence[Output],
        ledger: Ledger,
        *,
        holdout_fraction: float,
        seed: int,
        max_tokens: int | None,
        progress: Progress,
    ) -> None:
        self._outputs = outputs
        self._ledger = ledger
        self._fraction = holdout_fraction
        self._seed = seed
        self._max_tokens = max_tokens
        self._progress = progress
        self._parts: list[UnitResult] = []
        self._merged_lines: Counter[int] = Counter()
        self._bytes_before = 0
        self._bytes_here = 0

    def add(self, source: Source, unit: int, result: UnitResult) -> bool:
        """Take a result; return False once the budget is used up."""
        self._bytes_here += result.stored_bytes
        self._progress.update(self._bytes_before + self._bytes_here, source.path.name)
        self._merged_lines[source.index] += result.num_lines
        if result.part is not None:
            self._parts.append(result)
            if result.part[0] < result.part[1] - 1:
                return True
            result = _join(self._parts)
            self._parts = []
        self._ledger.add(source, result)
        arrays = result.arrays
        held = np.zeros(len(arrays["doc_lens"]), bool)
        if self._fraction:
            held = is_held_out(arrays["doc_hash"], self._fraction, self._seed)
        taken = self._within_budget(arrays["doc_lens"], held)
        if not taken.all():
            self._ledger.dropped["over_budget"] += int((~taken).sum())
        self._outputs[0].add(source, _choose(arrays, taken & ~held))
        if self._fraction:
            self._outputs[1].add(source, _choose(arrays, taken & held))
        return self._max_tokens is None or self._outputs[0].num_tokens < self._max_tokens

    def finish_source(self, source: Source, description: dict[str, Any]) -> None:
        """Note the end of a file; lines beyond the budget are counted, whatever they hold."""
        self._ledger.finish_source(source, description)
        if beyond := description["num_chosen"] - self._merged_lines[source.index]:
            self._ledger.dropped["over_budget"] += beyond
        self._bytes_before += description["size"]
        self._bytes_here = 0
        self._progress.update(self._bytes_before)

    def _within_budget(self, lens: np.ndarray, held: np.ndarray) -> np.ndarray:
        if self._max_tokens is None:
            return np.ones(len(lens), bool)
        counted = np.where(held, 0, lens)
        before = self._outputs[0].num_tokens + np.cumsum(counted) - counted
        within: np.ndarray = before < self._max_tokens
        return within


def _join(parts: Sequence[UnitResult]) -> UnitResult:
    """Return the one document that the parts are."""
    first = parts[0]
    tokens = np.concatenate([part.arrays["tokens"] for part in parts])
    first.arrays = first.arrays | {
        "tokens": tokens,
        "doc_lens": np.array([len(tokens)], np.int64),
        "doc_bytes": np.array([sum(int(part.arrays["doc_bytes"][0]) for part in parts)], np.int64),
    }
    return first


def _choose(arrays: dict[str, np.ndarray], chosen: np.ndarray) -> dict[str, np.ndarray]:
    """Return the arrays of some documents."""
    if chosen.all():
        return arrays
    of_tokens = np.repeat(chosen, arrays["doc_lens"])
    return {
        name: array[of_tokens if name in ("tokens", "supervised") else chosen]
        for name, array in arrays.items()
    }

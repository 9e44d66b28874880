"""Reading of token sets: memory-mapped, any row at any time, verified on first touch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from forgetscale.artifact import read_manifest
from forgetscale.data.format import KIND, ShardInfo, content_hash, unpack_doc_id
from forgetscale.data.shard import RowWindows, Shard, find_damages, shard_first_rows
from forgetscale.data.supervision import runs_to_mask
from forgetscale.errors import DataError


@dataclass(frozen=True, slots=True)
class DocumentPiece:
    """Part of a document inside one row: source file, line (first = 1), tokens in the row."""

    file: str
    line: int
    num_tokens: int


class TokenSet:
    """A token set artefact, open for reading.

    Files are memory-mapped; nothing is copied but the rows asked for. A record batch is hashed
    when its first row is read; a changed byte raises and is never delivered.

    Args:
        path: Artefact folder made by ``python -m data_prep build``.

    Attributes:
        is_supervised: Whether it holds SFT rows, which say which tokens are targets.

    Raises:
        DataError: No token set there, or a shard is missing or has another size.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest = read_manifest(self.path, KIND)
        self.payload: dict[str, Any] = self.manifest["payload"]
        self.content_hash: str = content_hash(self.payload)
        self.num_rows: int = self.payload["num_rows"]
        self.block_size: int = self.payload["block_size"]
        self.vocab_size: int = self.payload["vocab_size"]
        self.num_tokens: int = self.payload["num_tokens"]
        self.num_documents: int = self.payload["num_documents"]
        self.num_text_bytes: int = self.payload["num_text_bytes"]
        self.tokenizer_sha256: str = self.payload["tokenizer_sha256"]
        self.dtype = np.dtype(self.payload["dtype"])
        self.is_supervised = "supervision" in self.payload
        infos = [ShardInfo.from_json(entry) for entry in self.payload["shards"]]
        self._shards = [
            Shard(
                self.path / info.file,
                info,
                first,
                self.block_size,
                self.dtype,
                supervised=self.is_supervised,
            )
            for info, first in zip(infos, shard_first_rows(infos), strict=True)
        ]
        windows = RowWindows(self._shards, self.block_size, self.dtype)
        self._shard_start = windows.starts
        self._windows: np.ndarray = np.asarray(windows)
        counts = [batch.num_rows for info in infos for batch in info.batches]
        self._batch_first_row = np.concatenate([[0], np.cumsum(counts[:-1])]).astype(np.int64)
        self._batch_shard = np.repeat(np.arange(len(infos)), [len(info.batches) for info in infos])
        self._shard_first_batch = np.searchsorted(self._batch_shard, np.arange(len(infos)))
        self._ids_start = np.full(len(counts), -1, dtype=np.int64)
        self._lens_of_batch: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._runs_of_batch: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.num_rows

    @property
    def num_padding_tokens(self) -> int:
        """Positions at the end of rows that hold no token; not in ``num_tokens``."""
        return self.num_rows * self.block_size - self.num_tokens

    def targets_per_row(self, *, document_mask: bool) -> Fraction:
        """Return the mean number of target tokens of a row: all but the first of each text.

        Of SFT rows it is the mean number of supervised tokens.

        Args:
            document_mask: Each document piece is a text of its own; else each row is one.
        """
        if self.is_supervised:
            return Fraction(self.payload["supervision"]["num_supervised_tokens"], self.num_rows)
        num_texts = len(self.document_lengths()) if document_mask else self.num_rows
        return Fraction(self.num_tokens - num_texts, self.num_rows)

    def read(self, row_ids: Sequence[int] | np.ndarray | Tensor) -> Int64[Tensor, "rows block"]:
        """Return the ids of chosen rows, in the order asked for.

        Args:
            row_ids: Row numbers in ``0..num_rows - 1``; repeats are allowed.

        Raises:
            ValueError: A row number is outside the set.
            DataError: A record batch changed since it was written.
        """
        rows = np.asarray(row_ids, dtype=np.int64).reshape(-1)
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < self.num_rows:
            raise ValueError(
                f"{self.path} has rows 0 to {self.num_rows - 1}, asked for {int(rows.min())} to"
                f" {int(rows.max())}"
            )
        batches = np.searchsorted(self._batch_first_row, rows, side="right") - 1
        starts = self._ids_start[batches]
        if len(starts) and starts.min() < 0:
            for batch in np.unique(batches[starts < 0]):
                self._touch(int(batch))
            starts = self._ids_start[batches]
        starts += (rows - self._batch_first_row[batches]) * self.block_size
        return torch.from_numpy(self._windows[starts].astype(np.int64))

    def document_lens(
        self, row_ids: Sequence[int] | np.ndarray | Tensor
    ) -> Int64[Tensor, "rows pieces"]:
        """Return the tokens of each document piece of chosen rows, zeros after the last piece.

        What a row has beyond their sum is padding.

        Args:
            row_ids: Row numbers in ``0..num_rows - 1``; their ids were read before or are
                verified now.

        Raises:
            ValueError: A row number is outside the set.
            DataError: A record batch changed since it was written.
        """
        rows = np.asarray(row_ids, dtype=np.int64).reshape(-1)
        batches = np.searchsorted(self._batch_first_row, rows, side="right") - 1
        found = []
        for row, batch in zip(rows.tolist(), batches.tolist(), strict=True):
            if batch not in self._lens_of_batch:
                self.read([row])
                column = self._record_batch(batch).column(1)
                parts = column.values.to_numpy(), column.offsets.to_numpy()
                self._lens_of_batch[batch] = parts
            values, offsets = self._lens_of_batch[batch]
            inside = row - int(self._batch_first_row[batch])
            found.append(values[offsets[inside] : offsets[inside + 1]])
        out = np.zeros((len(rows), max(map(len, found), default=0)), dtype=np.int64)
        for place, lens in enumerate(found):
            out[place, : len(lens)] = lens
        return torch.from_numpy(out)

    def loss_mask(self, row_ids: Sequence[int] | np.ndarray | Tensor) -> Bool[Tensor, "rows block"]:
        """Return which tokens of chosen SFT rows are supervised.

        Args:
            row_ids: Row numbers in ``0..num_rows - 1``; their ids were read before or are
                verified now.

        Raises:
            ValueError: A row number is outside the set, or the set holds no SFT rows.
            DataError: A record batch changed since it was written.
        """
        if not self.is_supervised:
            raise ValueError(f"{self.path} holds no SFT rows, so it has no loss masks")
        rows = np.asarray(row_ids, dtype=np.int64).reshape(-1)
        batches = np.searchsorted(self._batch_first_row, rows, side="right") - 1
        runs, counts = [np.empty(0, np.uint32)], []
        for row, batch in zip(rows.tolist(), batches.tolist(), strict=True):
            if batch not in self._runs_of_batch:
                self.read([row])
                column = self._record_batch(batch).column(3)
                self._runs_of_batch[batch] = column.values.to_numpy(), column.offsets.to_numpy()
            values, offsets = self._runs_of_batch[batch]
            inside = row - int(self._batch_first_row[batch])
            runs.append(values[offsets[inside] : offsets[inside + 1]])
            counts.append(len(runs[-1]))
        ends = np.cumsum([0, *counts])
        return torch.from_numpy(runs_to_mask(np.concatenate(runs), ends, self.block_size))

    def document_pieces(self, row: int) -> list[DocumentPiece]:
        """Return the documents that row ``row`` consists of, in order.

        Raises:
            ValueError: The row is outside the set.
            DataError: Its record batch changed since it was written.
        """
        table, inside = self._place_of(row)
        sources = self.payload["sources"]
        pieces = []
        for doc_id, length in zip(
            table.column(2)[inside].as_py(), table.column(1)[inside].as_py(), strict=True
        ):
            index, line = unpack_doc_id(doc_id)
            name = sources[index]["path"] if index < len(sources) else f"source {index}"
            pieces.append(DocumentPiece(name, line, length))
        return pieces

    def document_ids(self, row: int) -> list[int]:
        """Return the ids of the documents of row ``row``, in order; see ``unpack_doc_id``.

        Raises:
            ValueError: The row is outside the set.
            DataError: Its record batch changed since it was written.
        """
        table, inside = self._place_of(row)
        found: list[int] = table.column(2)[inside].as_py()
        return found

    def _place_of(self, row: int) -> tuple[pa.RecordBatch, int]:
        """Return the verified record batch of a row, and where in it the row is."""
        self.read([row])
        batch = int(np.searchsorted(self._batch_first_row, row, side="right")) - 1
        return self._record_batch(batch), row - int(self._batch_first_row[batch])

    def document_lengths(self) -> Int64[np.ndarray, " pieces"]:
        """Return the tokens of every document piece of the set, in order of rows."""
        found = []
        for batch in range(len(self._batch_first_row)):
            if self._ids_start[batch] < 0:
                self._touch(batch)
            found.append(self._record_batch(batch).column(1).flatten().to_numpy())
        return np.concatenate(found).astype(np.int64)

    def damages(self) -> Iterator[str]:
        """Check every byte; see ``find_damages``."""
        return find_damages(self.path)

    def _record_batch(self, batch: int) -> pa.RecordBatch:
        number = int(self._batch_shard[batch])
        return self._shards[number].reader.get_batch(batch - int(self._shard_first_batch[number]))

    def _touch(self, batch: int) -> None:
        """Verify record batch ``batch`` (numbered over all shards) and note where its ids begin."""
        number = int(self._batch_shard[batch])
        shard = self._shards[number]
        index = batch - int(self._shard_first_batch[number])
        damage = shard.batch_damage(index)
        if damage is not None:
            raise DataError(damage)
        self._ids_start[batch] = self._shard_start[number] + shard.ids_start(index)

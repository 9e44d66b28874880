"""Reading of token sets: memory-mapped, any row at any time, verified on first touch."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import xxhash
from jaxtyping import Int64
from torch import Tensor

from forgetscale.artifact import hash_file, read_manifest, verify_artifact
from forgetscale.data.format import KIND, ShardInfo, content_hash, schema, unpack_doc_id
from forgetscale.errors import DataError


@dataclass(frozen=True, slots=True)
class DocumentPiece:
    """Part of a document inside one row: source file, line (first = 1), tokens in the row."""

    file: str
    line: int
    num_tokens: int


class _Shard:
    """One mapped shard file."""

    def __init__(self, path: Path, info: ShardInfo, block_size: int, dtype: np.dtype[Any]) -> None:
        self.path = path
        self.info = info
        size = path.stat().st_size if path.is_file() else None
        if size != info.size:
            found = "is missing" if size is None else f"has {size} bytes, expected {info.size}"
            raise DataError(f"{path} {found}; copy the token set again or build it again.")
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._bytes = memoryview(self._map)
        items = np.frombuffer(self._map, dtype=dtype, count=size // dtype.itemsize)
        self.windows = np.lib.stride_tricks.as_strided(
            items,
            shape=(len(items) - block_size + 1, block_size),
            strides=(dtype.itemsize, dtype.itemsize),
            writeable=False,
        )
        self._schema = schema(block_size, dtype)
        self._itemsize = dtype.itemsize

    @cached_property
    def reader(self) -> pa.RecordBatchFileReader:
        """Arrow reader, made once the footer is known to be good."""
        if (damage := self.frame_damage()) is not None:
            raise DataError(damage)
        try:
            reader = pa.ipc.open_file(pa.py_buffer(self._map))
        except pa.ArrowException as error:
            raise DataError(f"{self.path} is not an Arrow IPC file ({error}).") from error
        if reader.num_record_batches != len(self.info.batches) or reader.schema != self._schema:
            raise DataError(
                f"{self.path} has {reader.num_record_batches} record batches of"
                f" {reader.schema.names}, the manifest says {len(self.info.batches)} of"
                f" {self._schema.names}; build the token set again."
            )
        return reader

    def frame_damage(self) -> str | None:
        """Return a sentence if what stands outside record batches changed, else None."""
        batches = self.info.batches
        end = batches[-1].offset + batches[-1].size
        frame = xxhash.xxh3_64(self._bytes[: batches[0].offset])
        frame.update(self._bytes[end:])
        if frame.hexdigest() == self.info.frame_xxh3:
            return None
        return (
            f"{self.path} is damaged in its footer (xxh3 differs from the manifest);"
            " copy the token set again or build it again."
        )

    def batch_damage(self, index: int, first_row: int) -> str | None:
        """Return a sentence if record batch ``index`` changed, else None."""
        info = self.info.batches[index]
        found = xxhash.xxh3_64_hexdigest(self._bytes[info.offset : info.offset + info.size])
        if found == info.xxh3:
            return None
        return (
            f"{self.path} is damaged in record batch {index}, rows {first_row} to"
            f" {first_row + info.num_rows - 1} of the set (xxh3 {found}, expected {info.xxh3});"
            " copy the token set again or build it again."
        )

    def ids_start(self, index: int) -> int:
        """Return where the ids of record batch ``index`` begin, in items from the file start."""
        values = self.reader.get_batch(index).column(0).values
        address = values.buffers()[1].address + values.offset * self._itemsize
        offset: int = address - pa.py_buffer(self._map).address
        if not 0 <= offset < len(self._bytes) or offset % self._itemsize:
            raise DataError(f"{self.path} holds record batch {index} compressed or out of line.")
        return offset // self._itemsize


class TokenSet:
    """A token set artefact, open for reading.

    Files are memory-mapped; nothing is copied but the rows asked for. A record batch is hashed
    when its first row is read; a changed byte raises and is never delivered.

    Args:
        path: Artefact folder made by ``python -m data_prep build``.

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
        infos = [ShardInfo.from_json(entry) for entry in self.payload["shards"]]
        self._shards = [
            _Shard(self.path / info.file, info, self.block_size, self.dtype) for info in infos
        ]
        counts = [batch.num_rows for info in infos for batch in info.batches]
        self._batch_first_row = np.concatenate([[0], np.cumsum(counts[:-1])]).astype(np.int64)
        self._batch_shard = np.repeat(np.arange(len(infos)), [len(info.batches) for info in infos])
        self._shard_first_batch = np.searchsorted(self._batch_shard, np.arange(len(infos)))
        self._ids_start = np.full(len(counts), -1, dtype=np.int64)
        self._lens_of_batch: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.num_rows

    @property
    def num_padding_tokens(self) -> int:
        """Positions at the end of rows that hold no token; not in ``num_tokens``."""
        return self.num_rows * self.block_size - self.num_tokens

    def targets_per_row(self, *, document_mask: bool) -> Fraction:
        """Return the mean number of target tokens of a row: all but the first of each text.

        Args:
            document_mask: Each document piece is a text of its own; else each row is one.
        """
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
        if len(self._shards) == 1:
            return torch.from_numpy(self._shards[0].windows[starts].astype(np.int64))
        out = np.empty((len(rows), self.block_size), dtype=np.int64)
        owners = self._batch_shard[batches]
        for index in np.unique(owners):
            chosen = owners == index
            out[chosen] = self._shards[index].windows[starts[chosen]]
        return torch.from_numpy(out)

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

    def document_pieces(self, row: int) -> list[DocumentPiece]:
        """Return the documents that row ``row`` consists of, in order.

        Raises:
            ValueError: The row is outside the set.
            DataError: Its record batch changed since it was written.
        """
        self.read([row])
        batch = int(np.searchsorted(self._batch_first_row, row, side="right")) - 1
        table = self._record_batch(batch)
        inside = row - int(self._batch_first_row[batch])
        sources = self.payload["sources"]
        pieces = []
        for doc_id, length in zip(
            table.column(2)[inside].as_py(), table.column(1)[inside].as_py(), strict=True
        ):
            index, line = unpack_doc_id(doc_id)
            name = sources[index]["path"] if index < len(sources) else f"source {index}"
            pieces.append(DocumentPiece(name, line, length))
        return pieces

    def document_lengths(self) -> Int64[np.ndarray, " pieces"]:
        """Return the tokens of every document piece of the set, in order of rows."""
        found = []
        for batch in range(len(self._batch_first_row)):
            if self._ids_start[batch] < 0:
                self._touch(batch)
            found.append(self._record_batch(batch).column(1).flatten().to_numpy())
        return np.concatenate(found).astype(np.int64)

    def damages(self) -> Iterator[str]:
        """Check every byte and yield one sentence for each damaged place.

        Record batches are checked against their xxh3, shards against SHA-256, other files too;
        then that ids are inside the vocabulary and document lengths sum to the row length.
        """
        for number, shard in enumerate(self._shards):
            first_batch = int(self._shard_first_batch[number])
            found = [shard.frame_damage()]
            for index in range(len(shard.info.batches)):
                first_row = int(self._batch_first_row[first_batch + index])
                damage = shard.batch_damage(index, first_row)
                found.append(damage or self._content_damage(shard, index, first_row))
            yield from (sentence for sentence in found if sentence is not None)
            if not any(found) and hash_file(shard.path) != shard.info.sha256:
                yield f"{shard.path} has other content than when it was written (SHA-256 differs)."
        shards = {shard.info.file for shard in self._shards}
        for name in self.manifest["files"]:
            if name not in shards:
                try:
                    verify_artifact(self.path, KIND, only=[name])
                except DataError as error:
                    yield str(error)

    def _content_damage(self, shard: _Shard, index: int, first_row: int) -> str | None:
        """Return a sentence if an intact record batch breaks the rules of the format."""
        if shard.frame_damage() is not None:
            return None
        batch = shard.reader.get_batch(index)
        ids = batch.column(0).values.to_numpy()
        sums = np.add.reduceat(
            batch.column(1).flatten().to_numpy().astype(np.int64),
            batch.column(1).offsets.to_numpy()[:-1],
        )
        fills = sums <= self.block_size if self.num_padding_tokens else sums == self.block_size
        if int(ids.max()) < self.vocab_size and bool(fills.all()):
            return None
        return (
            f"{shard.path} holds ids outside the vocabulary of {self.vocab_size} or document"
            f" lengths that do not fill {self.block_size} tokens in record batch {index}, rows"
            f" {first_row} to {first_row + batch.num_rows - 1}; build the token set again."
        )

    def _record_batch(self, batch: int) -> pa.RecordBatch:
        number = int(self._batch_shard[batch])
        return self._shards[number].reader.get_batch(batch - int(self._shard_first_batch[number]))

    def _touch(self, batch: int) -> None:
        """Verify record batch ``batch`` (numbered over all shards) and note where its ids begin."""
        number = int(self._batch_shard[batch])
        shard = self._shards[number]
        index = batch - int(self._shard_first_batch[number])
        damage = shard.batch_damage(index, int(self._batch_first_row[batch]))
        if damage is not None:
            raise DataError(damage)
        self._ids_start[batch] = shard.ids_start(index)

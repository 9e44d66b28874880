"""One shard file of a token set: mapped, hashed, and what is wrong with it in one sentence."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from forgetscale.artifact import hash_file, read_manifest, verify_artifact
from forgetscale.data.format import KIND, ShardInfo, schema
from forgetscale.data.supervision import runs_to_mask
from forgetscale.errors import DataError

_REMEDY = "copy the token set again or build it again."


def shard_first_rows(infos: Sequence[ShardInfo]) -> list[int]:
    """Return the number of the first row of each shard in the set."""
    starts: list[int] = np.cumsum([0, *(info.num_rows for info in infos)])[:-1].tolist()
    return starts


class Shard:
    """One mapped shard file.

    Args:
        path: The file.
        info: What the manifest says about it.
        first_row: Number of its first row in the set.
        block_size: Tokens a row.
        dtype: Type of the ids.
        supervised: Whether it holds SFT rows, with loss masks.

    Raises:
        DataError: The file is missing or has another size.
    """

    def __init__(
        self,
        path: Path,
        info: ShardInfo,
        first_row: int,
        block_size: int,
        dtype: np.dtype[Any],
        *,
        supervised: bool = False,
    ) -> None:
        self.path = path
        self.info = info
        counts = [batch.num_rows for batch in info.batches]
        self._first_rows = (first_row + np.cumsum([0, *counts])).tolist()
        size = path.stat().st_size if path.is_file() else None
        if size is None:
            raise DataError(f"{path} is missing ({self._place(0)}); {_REMEDY}")
        if size != info.size:
            raise DataError(self._wrong_size(size))
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._bytes = memoryview(self._map)
        self.address: int = np.frombuffer(self._map, np.uint8).ctypes.data
        self._schema = schema(block_size, dtype, supervised=supervised)
        self._supervised = supervised
        self._itemsize = dtype.itemsize

    def _place(self, first: int, last: int | None = None) -> str:
        """Name record batches ``first`` to ``last`` (default: the last of all) and their rows."""
        last = len(self.info.batches) - 1 if last is None else last
        batches = f"batch {first}" if first == last else f"batches {first} to {last}"
        rows = f"{self._first_rows[first]} to {self._first_rows[last + 1] - 1}"
        return f"record {batches}, rows {rows} of the set"

    def _wrong_size(self, size: int) -> str:
        """Say which record batches a file of another size lacks, or that it is another file."""
        found = f"{self.path} has {size} bytes, expected {self.info.size}"
        with self.path.open("rb") as file:
            intact = 0
            for batch in self.info.batches:
                file.seek(batch.offset)
                if xxhash.xxh3_64_hexdigest(file.read(batch.size)) != batch.xxh3:
                    break
                intact += 1
        if intact == 0:
            return f"{found}: cut off or of another build ({self._place(0)}); {_REMEDY}"
        if intact == len(self.info.batches):
            return f"{found}: its footer is damaged ({self._place(0)} are not readable); {_REMEDY}"
        return f"{found}: cut off in {self._place(intact)}; {_REMEDY}"

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
            f"{self.path} is damaged in its footer (xxh3 differs from the manifest), without which"
            f" {self._place(0)} are not readable; {_REMEDY}"
        )

    def batch_damage(self, index: int) -> str | None:
        """Return a sentence if record batch ``index`` changed, else None."""
        info = self.info.batches[index]
        found = xxhash.xxh3_64_hexdigest(self._bytes[info.offset : info.offset + info.size])
        if found == info.xxh3:
            return None
        return (
            f"{self.path} is damaged in {self._place(index, index)} (xxh3 {found}, expected"
            f" {info.xxh3}); {_REMEDY}"
        )

    def ids_start(self, index: int) -> int:
        """Return where the ids of record batch ``index`` begin, in items from the file start."""
        values = self.reader.get_batch(index).column(0).values
        address = values.buffers()[1].address + values.offset * self._itemsize
        offset: int = address - pa.py_buffer(self._map).address
        if not 0 <= offset < len(self._bytes) or offset % self._itemsize:
            raise DataError(f"{self.path} holds record batch {index} compressed or out of line.")
        return offset // self._itemsize

    def damages(self, block_size: int, vocab_size: int, has_padding: bool) -> list[str]:
        """Return one sentence for each damaged place, after checking every byte.

        Args:
            block_size: Tokens a row.
            vocab_size: Ids are below it.
            has_padding: Rows of the set may end in padding.
        """
        frame = self.frame_damage()
        found = [self.batch_damage(index) for index in range(len(self.info.batches))]
        if len(found) > 1 and all(found):
            return [
                f"{self.path} is of another build: no record batch is the one the manifest names"
                f" ({self._place(0)}); {_REMEDY}"
            ]
        if frame is None:
            for index, damage in enumerate(found):
                found[index] = damage or self._content_damage(
                    index, block_size, vocab_size, has_padding
                )
        sentences = [sentence for sentence in [frame, *found] if sentence is not None]
        if not sentences and hash_file(self.path) != self.info.sha256:
            sentences.append(
                f"{self.path} has other content than when it was written (SHA-256 differs,"
                f" {self._place(0)}); {_REMEDY}"
            )
        return sentences

    def _content_damage(
        self, index: int, block_size: int, vocab_size: int, has_padding: bool
    ) -> str | None:
        """Return a sentence if an intact record batch breaks the rules of the format."""
        batch = self.reader.get_batch(index)
        ids = batch.column(0).values.to_numpy()
        sums = np.add.reduceat(
            batch.column(1).flatten().to_numpy().astype(np.int64),
            batch.column(1).offsets.to_numpy()[:-1],
        )
        fills = sums <= block_size if has_padding else sums == block_size
        if self._supervised and not self._masks_fit(batch, block_size):
            return (
                f"{self.path} holds loss masks that do not fit the rows in"
                f" {self._place(index, index)}; build the token set again."
            )
        if int(ids.max()) < vocab_size and bool(fills.all()):
            return None
        return (
            f"{self.path} holds ids outside the vocabulary of {vocab_size} or document lengths that"
            f" do not fill {block_size} tokens in {self._place(index, index)}; build the token set"
            " again."
        )

    def _masks_fit(self, batch: pa.RecordBatch, block_size: int) -> bool:
        """Return whether masks stay inside documents and leave the first token of each out."""
        column = batch.column(3)
        offsets = column.offsets.to_numpy()
        counts = np.diff(offsets)
        runs = column.flatten().to_numpy().astype(np.int64)
        totals = np.concatenate([[0], np.cumsum(runs)])
        if bool((counts % 2).any()) or int(np.diff(totals[offsets]).max()) > block_size:
            return False
        mask = runs_to_mask(runs, offsets, block_size)
        places = batch.column(1).offsets.to_numpy()
        lens = batch.column(1).flatten().to_numpy().astype(np.int64)
        for row in range(len(mask)):
            ends = np.cumsum(lens[places[row] : places[row + 1]])
            if mask[row, [0, *ends[:-1]]].any() or mask[row, ends[-1] :].any():
                return False
        return True


def find_damages(path: str | Path) -> Iterator[str]:
    """Check every byte of a token set and yield one sentence for each damaged place.

    Missing and cut shards are named like damaged ones; the others are still checked. Record
    batches are compared with their xxh3, shards with SHA-256, other files too; then that ids are
    inside the vocabulary and document lengths fill the row.

    Args:
        path: Token set folder.

    Raises:
        DataError: There is no valid manifest.
    """
    path = Path(path)
    manifest = read_manifest(path, KIND)
    payload = manifest["payload"]
    infos = [ShardInfo.from_json(entry) for entry in payload["shards"]]
    size, dtype = payload["block_size"], np.dtype(payload["dtype"])
    has_padding = payload["num_tokens"] < payload["num_rows"] * size
    supervised = "supervision" in payload
    for info, first_row in zip(infos, shard_first_rows(infos), strict=True):
        try:
            shard = Shard(path / info.file, info, first_row, size, dtype, supervised=supervised)
        except DataError as error:
            yield str(error)
            continue
        yield from shard.damages(size, payload["vocab_size"], has_padding)
    shards = {info.file for info in infos}
    for name in manifest["files"]:
        if name not in shards:
            try:
                verify_artifact(path, KIND, only=[name])
            except DataError as error:
                yield str(error)


class RowWindows:
    """Every run of ``block_size`` items from the first mapped shard to the last, as one array.

    Shards lie anywhere in memory, but always at whole pages, so the distance between two is a
    whole number of items. One array over the whole range lets a batch be gathered at once however
    many shards its rows are in. Nothing is read before it is indexed, and only places inside a
    shard are ever asked for.

    Attributes:
        starts: Item at which each shard begins.

    Args:
        shards: Mapped shards, at least one; they must outlive the array.
        block_size: Items a row.
        dtype: Of the items.
    """

    def __init__(self, shards: Sequence[Shard], block_size: int, dtype: np.dtype[Any]) -> None:
        first = min(shard.address for shard in shards)
        end = max(shard.address + shard.info.size for shard in shards)
        self.starts = [(shard.address - first) // dtype.itemsize for shard in shards]
        self.__array_interface__ = {
            "version": 3,
            "data": (first, True),
            "typestr": dtype.str,
            "shape": ((end - first) // dtype.itemsize - block_size + 1, block_size),
            "strides": (dtype.itemsize, dtype.itemsize),
        }

"""Writing of token set shards, hashed while they are written."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from jaxtyping import Bool, Integer

from forgetscale.artifact import ArtifactWriter
from forgetscale.data.format import (
    KIND,
    BatchInfo,
    PackedRows,
    ShardInfo,
    rows_per_batch,
    rows_per_shard,
    schema,
    token_dtype,
)
from forgetscale.data.packing import CONCAT_VERSION, cut_rows, slice_rows
from forgetscale.data.supervision import mark_supervised, split_marked


class _HashingFile(io.RawIOBase):
    """Write-only file that hashes what goes through it, whole and piece by piece."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._file = path.open("wb")
        self.sha256 = hashlib.sha256()
        self.frame = xxhash.xxh3_64()
        self.piece = self.frame
        self.size = 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.size

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._file.write(view)
        self.sha256.update(view)
        self.piece.update(view)
        self.size += len(view)
        return len(view)

    def close(self) -> None:
        self._file.close()
        super().close()


class _OpenShard:
    """The shard that is being written, under a provisional name."""

    def __init__(self, path: Path, file_schema: pa.Schema) -> None:
        self.path = path
        self.num_rows = 0
        self.batches: list[BatchInfo] = []
        self._schema = file_schema
        self._file = _HashingFile(path)
        self._writer = pa.ipc.new_file(self._file, file_schema)

    def append(self, rows: PackedRows) -> None:
        ids = pa.FixedSizeListArray.from_arrays(
            pa.array(np.ascontiguousarray(rows.input_ids).reshape(-1)), rows.input_ids.shape[1]
        )
        offsets = pa.array(rows.piece_offsets)
        columns = [
            ids,
            pa.ListArray.from_arrays(offsets, pa.array(rows.doc_lens)),
            pa.ListArray.from_arrays(offsets, pa.array(rows.doc_id)),
        ]
        if rows.loss_mask is not None:
            places = pa.array(rows.mask_offsets)
            columns.append(pa.ListArray.from_arrays(places, pa.array(rows.loss_mask)))
        start = self._file.size
        self._file.piece = xxhash.xxh3_64()
        self._writer.write_batch(pa.record_batch(columns, schema=self._schema))
        digest = self._file.piece.hexdigest()
        self._file.piece = self._file.frame
        self.batches.append(BatchInfo(len(rows), start, self._file.size - start, digest))
        self.num_rows += len(rows)

    def close(self) -> tuple[int, str, str]:
        """Write the footer; return size, SHA-256 and the hash of what stands outside batches."""
        self._writer.close()
        self._file.close()
        file = self._file
        return file.size, file.sha256.hexdigest(), file.frame.hexdigest()


class ShardWriter:
    """Write rows into ``shard-00000-of-000NN.arrow`` files of a folder.

    One call of ``append`` makes one record batch, so callers pass groups of
    ``rows_per_batch(block_size)`` rows. Use it inside an ``ArtifactWriter`` block.

    Args:
        directory: Existing folder.
        block_size: Tokens a row.
        vocab_size: Ids are below this number; decides between uint16 and uint32.
        shard_rows: Rows a shard; None for the default of the format.
        supervised: Write SFT rows: each group of rows has loss masks.

    Attributes:
        dtype: Type of the ids.
        supervised: As given.
        num_rows: Rows so far.
        num_supervised_tokens: Supervised tokens so far.
    """

    def __init__(
        self,
        directory: Path,
        *,
        block_size: int,
        vocab_size: int,
        shard_rows: int | None = None,
        supervised: bool = False,
    ) -> None:
        self.dtype = token_dtype(vocab_size)
        self.supervised = supervised
        self.num_rows = 0
        self.num_supervised_tokens = 0
        self._directory = Path(directory)
        self._block_size = block_size
        self._shard_rows = shard_rows or rows_per_shard(block_size)
        self._schema = schema(block_size, self.dtype, supervised=supervised)
        self._shard: _OpenShard | None = None
        self._closed: list[tuple[_OpenShard, tuple[int, str, str]]] = []

    def append(self, rows: PackedRows) -> None:
        """Write ``rows`` as one record batch.

        Raises:
            ValueError: The rows have another length or type than the set, or only one of the two
                has loss masks.
        """
        if (rows.loss_mask is not None) != self.supervised:
            raise ValueError("SFT rows have loss masks and go into a set of SFT rows, others not")
        if rows.input_ids.shape[1:] != (self._block_size,) or rows.input_ids.dtype != self.dtype:
            raise ValueError(
                f"rows are {rows.input_ids.dtype} {rows.input_ids.shape}, expected {self.dtype}"
                f" [rows, {self._block_size}]"
            )
        if self._shard is not None and self._shard.num_rows >= self._shard_rows:
            self._close_shard()
        if self._shard is None:
            name = f"shard-{len(self._closed):05d}.partial"
            self._shard = _OpenShard(self._directory / name, self._schema)
        self._shard.append(rows)
        self.num_rows += len(rows)
        if rows.loss_mask is not None:
            # Runs come in pairs, the second of each is supervised.
            self.num_supervised_tokens += int(rows.loss_mask[1::2].sum())

    def supervision(self) -> dict[str, Any] | None:
        """Return ``payload["supervision"]`` of SFT rows; None for other rows."""
        return {"num_supervised_tokens": self.num_supervised_tokens} if self.supervised else None

    def close(self) -> list[dict[str, Any]]:
        """Finish the last shard, give all their final names, return ``payload["shards"]``."""
        self._close_shard()
        shards = []
        for index, (shard, (size, sha256, frame)) in enumerate(self._closed):
            name = f"shard-{index:05d}-of-{len(self._closed):05d}.arrow"
            shard.path.rename(self._directory / name)
            info = ShardInfo(name, shard.num_rows, size, sha256, frame, tuple(shard.batches))
            shards.append(info.to_json())
        return shards

    def _close_shard(self) -> None:
        if self._shard is not None:
            self._closed.append((self._shard, self._shard.close()))
            self._shard = None


def write_token_set(
    directory: Path,
    input_ids: Integer[np.ndarray, "rows block"],
    *,
    vocab_size: int,
    tokenizer_sha256: str,
    doc_lens: Integer[np.ndarray, " documents"] | None = None,
    doc_ids: Integer[np.ndarray, " documents"] | None = None,
    supervised: Bool[np.ndarray, "rows block"] | None = None,
    num_text_bytes: int = 0,
    batch_rows: int | None = None,
    shard_rows: int | None = None,
    payload: Mapping[str, Any] | None = None,
) -> None:
    """Write rows that are in memory as a token set artefact (generated data, tests).

    Args:
        directory: Final folder; must not exist.
        input_ids: The rows.
        vocab_size: Every id is below it.
        tokenizer_sha256: ``tokenizer_hash`` of the tokenizer that made the ids.
        doc_lens: Lengths of the documents, summing to the number of ids; None: one a row.
        doc_ids: Id of each document; None: file 0, line 1 and so on.
        supervised: Makes SFT rows: True at tokens to learn, without effect at document starts.
        num_text_bytes: UTF-8 bytes of the text behind the rows, for bits per byte.
        batch_rows: Rows a record batch; None for the default of the format.
        shard_rows: Rows a shard; None for the default of the format.
        payload: Further or other manifest fields.

    Raises:
        ValueError: There are no rows, an id is not below ``vocab_size``, or lengths do not fit.
        DataError: The folder exists.
    """
    num_rows, block_size = input_ids.shape
    if num_rows == 0 or int(input_ids.min()) < 0 or int(input_ids.max()) >= vocab_size:
        raise ValueError(f"need at least one row and ids in 0..{vocab_size - 1}")
    lens = np.full(num_rows, block_size) if doc_lens is None else doc_lens
    if int(lens.sum()) != input_ids.size or int(lens.min()) < 1:
        raise ValueError(f"document lengths must be >= 1 and sum to {input_ids.size}")
    ids = np.arange(1, len(lens) + 1) if doc_ids is None else doc_ids
    dtype = token_dtype(vocab_size)
    flat = input_ids.astype(dtype).reshape(-1)
    if supervised is not None:
        flat = mark_supervised(flat, supervised.reshape(-1))
    whole = cut_rows(flat, lens, ids, num_rows=num_rows, block_size=block_size)
    step = batch_rows or rows_per_batch(block_size)
    with ArtifactWriter(directory, KIND) as artifact:
        writer = ShardWriter(
            artifact.path,
            block_size=block_size,
            vocab_size=vocab_size,
            shard_rows=shard_rows,
            supervised=supervised is not None,
        )
        for start in range(0, num_rows, step):
            rows = slice_rows(whole, start, min(start + step, num_rows))
            writer.append(rows if supervised is None else split_marked(rows, dtype))
        artifact.payload = token_set_payload(
            block_size=block_size,
            vocab_size=vocab_size,
            num_rows=num_rows,
            num_documents=len(lens),
            num_text_bytes=num_text_bytes,
            tokenizer_sha256=tokenizer_sha256,
            shards=writer.close(),
            supervision=writer.supervision(),
        ) | dict(payload or {})
        artifact.inputs = {"tokenizer": tokenizer_sha256}


def token_set_payload(
    *,
    block_size: int,
    vocab_size: int,
    num_rows: int,
    num_documents: int,
    num_text_bytes: int,
    tokenizer_sha256: str,
    shards: list[dict[str, Any]],
    num_padding_tokens: int = 0,
    supervision: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the manifest payload of a token set with the optional parts at their neutral value."""
    return ({} if supervision is None else {"supervision": supervision}) | {
        "block_size": block_size,
        "vocab_size": vocab_size,
        "dtype": token_dtype(vocab_size).name,
        "num_rows": num_rows,
        "num_tokens": num_rows * block_size - num_padding_tokens,
        "num_documents": num_documents,
        "num_text_bytes": num_text_bytes,
        "tokenizer_sha256": tokenizer_sha256,
        "document_end": {"policy": "none", "token_id": None},
        "packing": {"method": "concat", "version": CONCAT_VERSION, "dropped_tail_tokens": 0},
        "chat": False,
        "sources": [],
        "rejects": {"num_rejects": 0},
        "shards": shards,
    }

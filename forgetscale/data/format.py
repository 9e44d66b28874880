"""Token set format: Arrow columns, document ids, what the manifest says about each shard.

A token set is an artefact folder of kind ``token_set``. Its shards are Arrow IPC files,
uncompressed, one row = one packed block:

- ``input_ids``: ``fixed_size_list<uint16 or uint32>[L]``;
- ``doc_lens``: ``list<uint32>``, tokens of each document piece in the row, at least one; what the
  row has beyond their sum is padding, which only best-fit packing leaves;
- ``doc_id``: ``list<uint64>``, where each piece comes from: source file index in the upper 24 bits
  (position in ``payload["sources"]``), line number (first line = 1) in the lower 40 bits.

Labels and masks are derived, never stored; only SFT rows (``payload["supervision"]`` is there) have
one more column, because which tokens are an assistant's cannot be derived from ids:

- ``loss_mask``: ``list<uint32>``, run lengths over the row: tokens that are not supervised, tokens
  that are, and so on in turns, beginning with the first kind and ending with the last supervised
  run, so their number is even and what lies beyond is not supervised. Neither padding nor the first
  token of a document piece is ever supervised.

Every byte of a shard is covered by an xxh3 hash: one
for each record batch (message header and body; the first one includes the start of the file) and
one for what stands outside them, the footer (``frame_xxh3``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Int32, UInt, UInt32, UInt64

from forgetscale.artifact import canonical_json, hash_bytes

KIND = "token_set"
REJECTS_NAME = "rejects.jsonl"
LINE_BITS = 40
MAX_FILES = 1 << (64 - LINE_BITS)
MAX_LINE = (1 << LINE_BITS) - 1
_TOKENS_PER_BATCH = 1 << 18
_TOKENS_PER_SHARD = 1 << 27
_DEFINING_KEYS = (
    "block_size",
    "vocab_size",
    "dtype",
    "num_rows",
    "tokenizer_sha256",
    "document_end",
    "packing",
    "chat",
)


@dataclass(frozen=True, slots=True)
class BatchInfo:
    """One record batch of a shard: its rows, its byte range in the file and the hash of it."""

    num_rows: int
    offset: int
    size: int
    xxh3: str


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """One shard file as the manifest lists it."""

    file: str
    num_rows: int
    size: int
    sha256: str
    frame_xxh3: str
    batches: tuple[BatchInfo, ...]

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ShardInfo:
        """Return the shard described by an entry of ``payload["shards"]``."""
        fields = {key: value[key] for key in ("file", "num_rows", "size", "sha256", "frame_xxh3")}
        return cls(**fields, batches=tuple(BatchInfo(**entry) for entry in value["batches"]))

    def to_json(self) -> dict[str, Any]:
        """Return the entry for ``payload["shards"]``."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class PackedRows:
    """Rows ready to be written, with the document pieces they consist of.

    Piece lists of all rows stand one after another; those of row ``i`` are
    ``piece_offsets[i]`` to ``piece_offsets[i + 1]``. Run lengths of SFT rows stand in
    ``loss_mask`` in the same way, by ``mask_offsets``.
    """

    input_ids: UInt[np.ndarray, "rows block"]
    doc_lens: UInt32[np.ndarray, " pieces"]
    doc_id: UInt64[np.ndarray, " pieces"]
    piece_offsets: Int32[np.ndarray, " rows_plus_1"]
    loss_mask: UInt32[np.ndarray, " runs"] | None = None
    mask_offsets: Int32[np.ndarray, " rows_plus_1"] | None = None

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.input_ids)


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the smallest of uint16 and uint32 that holds every id below ``vocab_size``.

    Raises:
        ValueError: ``vocab_size`` is not in 1..2**32.
    """
    if not 1 <= vocab_size <= 1 << 32:
        raise ValueError(f"vocab_size must be in 1..2**32, got {vocab_size}")
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def rows_per_batch(block_size: int) -> int:
    """Return how many rows a record batch holds: about 262,144 tokens, 0.5 or 1 MiB."""
    return max(1, _TOKENS_PER_BATCH // block_size)


def rows_per_shard(block_size: int) -> int:
    """Return how many rows a shard holds: whole record batches, about 134 million tokens."""
    batch = rows_per_batch(block_size)
    return max(1, _TOKENS_PER_SHARD // (batch * block_size)) * batch


def schema(block_size: int, dtype: np.dtype[Any], *, supervised: bool = False) -> pa.Schema:
    """Return the Arrow schema of a shard; ``supervised`` adds the loss mask of SFT rows."""
    columns = [
        ("input_ids", pa.list_(pa.from_numpy_dtype(dtype), block_size)),
        ("doc_lens", pa.list_(pa.uint32())),
        ("doc_id", pa.list_(pa.uint64())),
    ]
    if supervised:
        columns.append(("loss_mask", pa.list_(pa.uint32())))
    return pa.schema(columns)


def pack_doc_id(file_index: int, line: int) -> int:
    """Return the 64-bit document id of a line.

    Args:
        file_index: Position of the source file in the manifest, 0..2**24 - 1.
        line: Line in the (decompressed) file, first line = 1, up to 2**40 - 1.

    Raises:
        ValueError: One of them does not fit.
    """
    if not 0 <= file_index < MAX_FILES or not 0 <= line <= MAX_LINE:
        raise ValueError(
            f"file index {file_index} and line {line} must be below {MAX_FILES} and {MAX_LINE + 1}"
        )
    return file_index << LINE_BITS | line


def unpack_doc_id(doc_id: int) -> tuple[int, int]:
    """Return ``(file index, line)`` of a document id."""
    return int(doc_id) >> LINE_BITS, int(doc_id) & MAX_LINE


def content_hash(payload: Mapping[str, Any]) -> str:
    """Return the hash of what a token set holds, as 64 hexadecimal digits.

    It covers shape, tokenizer, packing and the bytes of every shard; not paths, times or versions.
    It seeds the order of rows and is stored in checkpoints.
    """
    parts = {key: payload[key] for key in _DEFINING_KEYS}
    parts["shards"] = [
        {"num_rows": shard["num_rows"], "sha256": shard["sha256"]} for shard in payload["shards"]
    ]
    return hash_bytes(canonical_json(parts))

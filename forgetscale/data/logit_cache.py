"""What a model says about every target token of token sets, kept in files: the logit cache.

An artefact folder with one safetensors file per few hundred rows, read through memory maps: a row
costs two numbers of an index and the bytes it holds. Only targets are stored, so a file begins
with where each row's begin. Tensors of a file, with ``R`` rows, ``M`` targets, ``K`` tokens per
target, ``S`` texts:

- ``offsets [R + 1]`` int64: row ``r`` of the file has the targets ``offsets[r]`` to
  ``offsets[r + 1] - 1``; ``places [M]`` int32: which token of its row each target is;
- ``log_prob [M]`` fp32: of the token that stands there, in nats;
- ``ids [M, K]`` int32, ``log_probs [M, K]`` fp32 or fp16: the most likely tokens, best first;
  ``log_rest [M]`` fp32: of all others together;
- ``text [M]`` int32, ``text_nll [S]`` fp32: which document piece each target is in, and the mean
  negative log-likelihood of its targets, in nats.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy
import torch
from jaxtyping import Int64
from torch import Tensor

from forgetscale.artifact import canonical_json, hash_bytes, hash_file, read_manifest
from forgetscale.errors import DataError

KIND = "logit_cache"
STORED_DTYPES: Mapping[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
}
_NUMPY = {"I64": np.int64, "I32": np.int32, "F32": np.float32, "F16": np.float16}
_BYTES_PER_FILE = 1 << 26
_MOST_ROWS = 1024
PER_TARGET = ("log_prob", "ids", "log_probs", "log_rest", "text_nll")
"""What a cache can say about each target."""


class RowSpan(NamedTuple):
    """Rows of one set that share a file."""

    set_index: int
    first: int
    num_rows: int

    @property
    def file(self) -> str:
        """Name of the file inside the cache."""
        return file_name(self.set_index, self.first)


def file_name(set_index: int, first_row: int) -> str:
    """Return the name of the file that begins with a row."""
    return f"set-{set_index:03d}/rows-{first_row:010d}.safetensors"


def rows_per_file(block_size: int, top_k: int) -> int:
    """Return how many rows share a file, from the most bytes a row can take."""
    return max(1, min(_MOST_ROWS, _BYTES_PER_FILE // (block_size * (8 * top_k + 20))))


def row_spans(num_rows: Sequence[int], per_file: int) -> list[RowSpan]:
    """Return the files of a cache.

    Args:
        num_rows: Of each set.
        per_file: Rows of a file, > 0.
    """
    return [
        RowSpan(index, first, min(per_file, count - first))
        for index, count in enumerate(num_rows)
        for first in range(0, count, per_file)
    ]


def write_span(path: Path, columns: Mapping[str, np.ndarray]) -> None:
    """Write the tensors of one file; it appears whole or not at all."""
    part = path.with_name(f".{path.name}.tmp")
    safetensors.numpy.save_file(dict(columns), part)
    part.replace(path)


def map_file(path: Path) -> dict[str, np.ndarray]:
    """Return the tensors of a file as views of its memory map.

    Raises:
        DataError: The file is damaged.
    """
    try:
        whole = np.memmap(path, dtype=np.uint8, mode="r")
        size = int(whole[:8].view("<u8")[0])
        header = json.loads(whole[8 : 8 + size].tobytes())
        found = {}
        for name, entry in header.items():
            start, end = (8 + size + place for place in entry["data_offsets"])
            values = whole[start:end].view(_NUMPY[entry["dtype"]])
            found[name] = values.reshape(entry["shape"])
    except (ValueError, KeyError, IndexError) as error:
        raise DataError(f"{path} is damaged ({error}); make the cache again.") from error
    return found


class LogitCache:
    """A logit cache, open for reading; a file is verified when its first row is read.

    Args:
        path: Artefact folder made by ``forgetscale analyze --cache-logits``.

    Attributes:
        content_hash: Of everything in it, however and whenever it was made.
        set_hashes: Content hash of each token set it covers.

    Raises:
        DataError: There is no cache.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._manifest = read_manifest(self.path, KIND)
        payload: dict[str, Any] = self._manifest["payload"]
        self.model_hash: str = payload["model_hash"]
        self.tokenizer_sha256: str = payload["tokenizer_sha256"]
        self.document_mask: bool = payload["document_mask"]
        self.top_k: int = payload["top_k"]
        self.block_size: int = payload["block_size"]
        self.median_text_nll: float = payload["median_text_nll"]
        self.set_hashes: tuple[str, ...] = tuple(part["content_hash"] for part in payload["sets"])
        self._per_file: int = payload["rows_per_file"]
        files = {name: entry["sha256"] for name, entry in self._manifest["files"].items()}
        self.content_hash = hash_bytes(canonical_json({"payload": payload, "files": files}))
        self._open: dict[str, dict[str, np.ndarray]] = {}

    def _file(self, name: str) -> dict[str, np.ndarray]:
        if name not in self._open:
            path = self.path / name
            if not path.is_file():
                raise DataError(f"{path} is missing; make the cache again.")
            if hash_file(path) != self._manifest["files"][name]["sha256"]:
                raise DataError(
                    f"{path} has other content than when it was written (SHA-256 differs); make the"
                    " cache again."
                )
            self._open[name] = map_file(path)
        return self._open[name]

    def read(
        self,
        set_ids: Int64[np.ndarray, " rows"],
        rows: Int64[np.ndarray, " rows"],
        names: Sequence[str],
    ) -> dict[str, Tensor]:
        """Return ``[rows, block, ...]`` by name for chosen rows, 0 where no target is.

        Args:
            set_ids: Which of ``set_hashes`` each row is from.
            rows: Row numbers in their sets.
            names: Of ``PER_TARGET``.

        Raises:
            DataError: A file is missing or changed.
        """
        out = {name: self._empty(name, len(rows)) for name in names}
        for place, (index, row) in enumerate(zip(set_ids.tolist(), rows.tolist(), strict=True)):
            first = row // self._per_file * self._per_file
            file = self._file(file_name(index, first))
            start, end = file["offsets"][row - first : row - first + 2].tolist()
            tokens = file["places"][start:end]
            for name, values in out.items():
                if name == "text_nll":
                    values[place, tokens] = file["text_nll"][file["text"][start:end]]
                else:
                    values[place, tokens] = file[name][start:end]
        return {name: torch.from_numpy(values) for name, values in out.items()}

    def _empty(self, name: str, num_rows: int) -> np.ndarray:
        shape = (num_rows, self.block_size)
        if name == "ids":
            return np.zeros((*shape, self.top_k), dtype=np.int32)
        return np.zeros((*shape, self.top_k) if name == "log_probs" else shape, dtype=np.float32)

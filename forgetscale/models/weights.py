"""Read slices of a Hugging Face model straight from memory-mapped safetensors."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
import xxhash
from jaxtyping import Shaped
from torch import Tensor

from forgetscale.errors import DataError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
HASH_CHUNK_BYTES = 1 << 24


class SafetensorsFolder:
    """The weights of one model folder, by name, readable in flat slices.

    Only the pages of a slice are touched: a rank that owns a thousandth of a tensor reads a
    thousandth of its rows.

    Args:
        directory: Hugging Face folder with ``model.safetensors`` or an index and its parts.

    Raises:
        DataError: No safetensors, a missing part, or a damaged file.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise DataError(f"model folder {self.directory} does not exist; check model.path.")
        self._open: dict[str, Any] = {}
        self._file_of = self._read_index()

    def _read_index(self) -> dict[str, str]:
        index = self.directory / INDEX_FILE
        if index.is_file():
            try:
                weight_map = json.loads(index.read_bytes())["weight_map"]
            except (ValueError, KeyError) as error:
                raise DataError(f"{index} is not a safetensors index ({error}).") from error
            for name in sorted(set(weight_map.values())):
                if "/" in name or not (self.directory / name).is_file():
                    raise DataError(f"{index} names {name}, which is not in the folder.")
            return dict(weight_map)
        if (self.directory / SINGLE_FILE).is_file():
            return dict.fromkeys(self._handle(SINGLE_FILE).keys(), SINGLE_FILE)
        todo = "save the model with save_pretrained(safe_serialization=True)."
        if (self.directory / "export").is_dir():
            todo = f"it is a run: name its model, {self.directory / 'export'}."
        raise DataError(
            f"model folder {self.directory} holds neither {SINGLE_FILE} nor {INDEX_FILE}; {todo}"
        )

    def _handle(self, file: str) -> Any:
        if file not in self._open:
            path = self.directory / file
            try:
                self._open[file] = safetensors.safe_open(path, "pt")
            except (safetensors.SafetensorError, OSError) as error:
                raise DataError(f"{path} is not readable safetensors ({error}).") from error
        return self._open[file]

    def names(self) -> list[str]:
        """Return all tensor names, sorted."""
        return sorted(self._file_of)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor; DataError if the folder does not hold it."""
        if name not in self._file_of:
            raise DataError(f"model folder {self.directory} holds no tensor {name!r}.")
        return tuple(self._handle(self._file_of[name]).get_slice(name).get_shape())

    def read_flat(
        self, name: str, start: int, length: int, dtype: torch.dtype | None = None
    ) -> Shaped[Tensor, " length"]:
        """Return elements ``start .. start + length`` of the flattened tensor.

        Args:
            name: Tensor name.
            start: First element, >= 0.
            length: Elements, >= 0; the range must end inside the tensor.
            dtype: Type of the result; None keeps the stored one.
        """
        shape = self.shape(name)
        size = math.prod(shape)
        assert 0 <= start and start + length <= size, (name, start, length, size)
        view = self._handle(self._file_of[name]).get_slice(name)
        if length == 0:
            return torch.empty(0, dtype=dtype or torch.float32)
        values: Tensor
        if not shape:
            values = self._handle(self._file_of[name]).get_tensor(name).reshape(1)
        else:
            width = size // shape[0]
            low, high = start // width, -(-(start + length) // width)
            values = view[low:high].reshape(-1)[start - low * width :][:length]
        return values if dtype is None else values.to(dtype)

    def mapped(self, name: str) -> Tensor:
        """Return a whole tensor that lives in the memory map; only what is used is read."""
        self.shape(name)
        view: Tensor = self._handle(self._file_of[name]).get_slice(name)[:]
        return view

    def files(self) -> list[str]:
        """Return the weight files, sorted."""
        return sorted(set(self._file_of.values()))

    def names_in(self, file: str) -> list[str]:
        """Return the names of the tensors of one weight file, sorted."""
        return sorted(name for name, place in self._file_of.items() if place == file)

    def hash_weight_file(self, name: str) -> str:
        """Return the xxh3-128 of one weight file (read at disk speed)."""
        digest = xxhash.xxh3_128()
        with (self.directory / name).open("rb") as file:
            while chunk := file.read(HASH_CHUNK_BYTES):
                digest.update(chunk)
        return digest.hexdigest()

    def check_shapes(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Check that every parameter of the architecture is here with the right shape.

        Raises:
            DataError: A tensor is missing or misshapen; the message names it.
        """
        for name, shape in expected.items():
            found = self.shape(name)
            if found != shape:
                raise DataError(
                    f"{self.directory}: {name} has shape {list(found)}, but config.json asks for"
                    f" {list(shape)}; the folder mixes two models."
                )

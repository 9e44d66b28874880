"""Tensors of a model folder as bytes at known places: any range, one positioned read.

A mapping of a file counts as memory of the process that touches it; tools that pass over whole
models in bounded memory read through here instead.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from forgetscale.errors import DataError
from forgetscale.models.weights import INDEX_FILE, SINGLE_FILE, SafetensorsFolder

FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
FLOAT_NAMES = {dtype: name for name, dtype in FLOATS.items()}
_PICKLES = {".bin", ".pt", ".pth", ".ckpt"}
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor lies."""

    name: str
    file: str
    """File in the folder."""
    code: str
    """Type as the format names it, such as ``BF16``."""
    shape: tuple[int, ...]
    offset: int
    """First byte in the file."""
    num_bytes: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def dtype(self) -> torch.dtype | None:
        """Float type, or None for integers, booleans and packed types."""
        return FLOATS.get(self.code)


def refuse_folder(directory: Path) -> None:
    """Refuse folders whose weights cannot be compared element by element, with the reason.

    Raises:
        DataError: A LoRA adapter, pickle files only, or a quantised model.
    """
    if not directory.is_dir():
        raise DataError(f"model folder {directory} does not exist; check the path.")
    files = sorted(path.name for path in directory.iterdir() if path.is_file())
    has_weights = any(name.endswith(".safetensors") and "adapter" not in name for name in files)
    if "adapter_config.json" in files and not has_weights:
        raise DataError(
            f"{directory} holds a LoRA adapter, not a model; merge it into its source model first"
            " (peft: merge_and_unload, then save_pretrained)."
        )
    pickles = [name for name in files if Path(name).suffix in _PICKLES]
    if pickles and not has_weights:
        raise DataError(
            f"{directory} holds its weights only as pickle ({pickles[0]}), and reading a pickle"
            " runs whatever code is stored in it; convert it with"
            " save_pretrained(safe_serialization=True) where you trust it."
        )
    config = directory / "config.json"
    if config.is_file():
        try:
            quantised = json.loads(config.read_bytes()).get("quantization_config")
        except (ValueError, AttributeError) as error:
            raise DataError(f"{config} is not a model configuration ({error}).") from error
        if quantised:
            raise DataError(
                f"{directory} is quantised ({quantised.get('quant_method', 'unknown method')}):"
                " its weights are packed codes; dequantise it to bfloat16 first."
            )


def read_header(path: Path) -> tuple[bytes, list[StoredTensor]]:
    """Return the header of a safetensors file, as stored, and its tensors by place.

    Raises:
        DataError: The file is cut short or is no safetensors file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(_MAX_HEADER_BYTES, size - 8):
            raise DataError(f"{path} is not a safetensors file; copy it again.")
        head = file.read(length)
    try:
        content = json.loads(head)
        found = [
            StoredTensor(
                name,
                path.name,
                str(entry["dtype"]),
                tuple(int(n) for n in entry["shape"]),
                8 + length + int(entry["data_offsets"][0]),
                int(entry["data_offsets"][1]) - int(entry["data_offsets"][0]),
            )
            for name, entry in content.items()
            if name != "__metadata__"
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} has a damaged header ({error!r}); copy it again.") from error
    found.sort(key=lambda tensor: tensor.offset)
    for tensor in found:
        if tensor.offset + tensor.num_bytes > size:
            raise DataError(
                f"{path} has {size} bytes, but {tensor.name} ends at"
                f" {tensor.offset + tensor.num_bytes}; it was cut short, copy it again."
            )
        if tensor.dtype is not None and tensor.num_bytes != tensor.numel * tensor.dtype.itemsize:
            raise DataError(f"{path}: size and shape of {tensor.name} differ; copy it again.")
    return len(head).to_bytes(8, "little") + head, found


class RawFolder:
    """The weights of a Hugging Face folder, readable by range without mapping them.

    Args:
        directory: Folder with ``model.safetensors`` or an index and its parts.

    Raises:
        DataError: No safetensors, a damaged file, an adapter, a pickle or a quantised model.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)
        refuse_folder(self.directory)
        has_index = (self.directory / INDEX_FILE).is_file()
        if not has_index and (self.directory / SINGLE_FILE).is_file():
            # Not through a mapping: that of a file larger than memory may be refused.
            self._open([SINGLE_FILE])
        else:
            self._open(SafetensorsFolder(self.directory).files())

    @classmethod
    def of_file(cls, path: Path) -> RawFolder:
        """Open a single safetensors file that need not be a model."""
        if not path.is_file():
            raise DataError(f"{path} does not exist; name a safetensors file.")
        folder = cls.__new__(cls)
        folder.directory = path.parent
        folder._open([path.name])
        return folder

    def _open(self, files: list[str]) -> None:
        self.files = files
        self.headers: dict[str, bytes] = {}
        self.tensors: dict[str, StoredTensor] = {}
        for file in self.files:
            self.headers[file], found = read_header(self.directory / file)
            self.tensors |= {tensor.name: tensor for tensor in found}
        self._descriptors: dict[str, int] = {}
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def read(self, name: str, start: int, length: int) -> Tensor:
        """Return elements ``start .. start + length`` of a flattened float tensor.

        The result is overwritten by the next read of this object.

        Args:
            name: Tensor name.
            start: First element, >= 0.
            length: Elements; the range ends inside the tensor.
        """
        dtype = self.tensors[name].dtype
        assert dtype is not None, name
        size = dtype.itemsize
        return self.read_bytes(name, start * size, length * size).view(dtype)

    def read_bytes(self, name: str, start: int, length: int) -> Tensor:
        """Return bytes ``start .. start + length`` of a tensor; see ``read``."""
        if self._buffer.numel() < length:
            self._buffer = torch.empty(length, dtype=torch.uint8)
        self._fill(name, start, self._buffer[:length])
        return self._buffer[:length]

    def read_whole(self, name: str) -> Tensor:
        """Return a float tensor, flat, in memory of its own."""
        dtype = self.tensors[name].dtype
        assert dtype is not None, name
        own = torch.empty(self.tensors[name].num_bytes, dtype=torch.uint8)
        self._fill(name, 0, own)
        return own.view(dtype)

    def _fill(self, name: str, start: int, out: Tensor) -> None:
        """Read bytes of a tensor from ``start`` on until ``out`` is full."""
        tensor, length = self.tensors[name], out.numel()
        assert 0 <= start and start + length <= tensor.num_bytes, (name, start, length)
        if tensor.file not in self._descriptors:
            path = self.directory / tensor.file
            self._descriptors[tensor.file] = _open_to_pass_over(path)
        view = out.numpy().data
        done = 0
        while done < length:
            got = os.preadv(
                self._descriptors[tensor.file], [view[done:]], tensor.offset + start + done
            )
            if got == 0:
                raise DataError(f"{self.directory / tensor.file} became shorter while it was read.")
            done += got

    def close(self) -> None:
        """Close the files."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()


def _open_to_pass_over(path: Path) -> int:
    """Open a file to be read from front to back: the system then reads further ahead."""
    descriptor = os.open(path, os.O_RDONLY)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
    return descriptor


def layout_header(tensors: list[StoredTensor], like: bytes) -> tuple[bytes, list[StoredTensor]]:
    """Return the header of a file that holds ``tensors`` in this order, and their places.

    Args:
        tensors: What the file is to hold; their offsets are not used.
        like: Header whose metadata is taken over, and which is kept where it fits as it is.
    """
    old = json.loads(like[8:])
    header: dict[str, object] = {}
    if "__metadata__" in old:
        header["__metadata__"] = old["__metadata__"]
    start = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": tensor.code,
            "shape": list(tensor.shape),
            "data_offsets": [start, start + tensor.num_bytes],
        }
        start += tensor.num_bytes
    head = like[8:]
    if header != old:
        head = json.dumps(header, separators=(",", ":")).encode()
        head += b" " * (-len(head) % 8)
    whole = len(head).to_bytes(8, "little") + head
    found, offset = [], len(whole)
    for tensor in tensors:
        found.append(replace(tensor, offset=offset))
        offset += tensor.num_bytes
    return whole, found

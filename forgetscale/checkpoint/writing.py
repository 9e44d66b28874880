"""Write a rank's files of a checkpoint: hashed, flushed, read back; in a thread of its own."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from forgetscale.artifact import hash_file
from forgetscale.errors import CheckpointError
from forgetscale.points import reach

Chunks = Sequence[bytes | Tensor]
"""What a file holds, one part after the other; tensors on any device."""


def _bytes_of(chunk: bytes | Tensor) -> memoryview:
    if isinstance(chunk, bytes):
        return memoryview(chunk)
    # One tensor at a time in host memory, where it is not there already.
    host = chunk.detach().cpu().contiguous().view(torch.uint8)
    data: memoryview = host.numpy().data
    return data


def write_file(path: Path, chunks: Chunks, tell: Callable[[int], None] = lambda size: None) -> str:
    """Write a new file, flush it to the disk, read it back and compare.

    Args:
        path: New file.
        chunks: Its content.
        tell: Hears how many bytes were written since it last heard.

    Returns:
        SHA-256 of the content as it was in memory.

    Raises:
        OSError: A write or flush failed. A flush is never tried again: after a failure the system
            may report success for data it has dropped (Rebello et al., ATC 2020).
        CheckpointError: What was read back is not what was written.
    """
    digest = hashlib.sha256()
    with path.open("xb", buffering=0) as file:
        reach("file: opened", path)
        for number, chunk in enumerate(chunks):
            data = _bytes_of(chunk)
            size = len(data)
            digest.update(data)
            while len(data):  # the system may take less than it is given
                data = data[file.write(data) :]
            tell(size)
            if number == 0:
                reach("file: begun", path)
        reach("file: written", path)
        os.fsync(file.fileno())
        reach("file: flushed", path)
        if hasattr(os, "posix_fadvise"):
            # So that reading back asks the disk, and the cache stays with the training data.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if hash_file(path) != digest.hexdigest():
        raise CheckpointError(
            f"{path} reads back with other content than was written; the disk or file system is at"
            " fault; the checkpoint before it is intact, mend it and start the same command again."
        )
    reach("file: verified", path)
    return digest.hexdigest()


class Work:
    """A function that runs beside training and whose end is asked for.

    Args:
        function: What to do; it must not talk to other ranks.
        background: Run it in a thread; False runs it here and now.

    Attributes:
        error: What it raised, or None; read it after ``ended``.
    """

    def __init__(self, function: Callable[[], None], *, background: bool) -> None:
        self.error: BaseException | None = None
        self._function = function
        self._thread: threading.Thread | None = None
        if background:
            # A daemon: a run that fails elsewhere must not wait for the disk before it ends.
            self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
            self._thread.start()
        else:
            self._run()

    def _run(self) -> None:
        try:
            self._function()
        except BaseException as found:  # kept for the step boundary, where all ranks hear of it
            self.error = found

    @property
    def ended(self) -> bool:
        """True when the function has returned or failed."""
        return self._thread is None or not self._thread.is_alive()

    def wait(self, seconds: float | None = None) -> None:
        """Wait for the end, at most ``seconds``."""
        if self._thread is not None:
            self._thread.join(seconds)


class Files:
    """A rank's files of one checkpoint, and how far their writing is.

    Args:
        folder: Existing folder.
        contents: Relative name -> content.

    Attributes:
        hashes: Relative name -> SHA-256 of what is written.
        num_bytes: Bytes written so far.
    """

    def __init__(self, folder: Path, contents: Mapping[str, Chunks]) -> None:
        self.hashes: dict[str, str] = {}
        self.num_bytes = 0
        self._folder = folder
        self._contents = contents

    def write(self) -> None:
        """Write, flush and verify all of them."""
        for name, chunks in self._contents.items():
            path = self._folder / name
            path.parent.mkdir(exist_ok=True)
            self.hashes[name] = write_file(path, chunks, self._add)
        reach("save: rank done", self._folder)

    def _add(self, size: int) -> None:
        self.num_bytes += size

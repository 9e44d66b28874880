"""How a rank without a process group learns that another one was killed."""

from __future__ import annotations

import threading
from pathlib import Path

SIGN_SECONDS = 10.0
"""Between two signs of a rank."""
SILENT_SECONDS = 180.0
"""Without a sign a rank that began counts as dead: far more than a file system's own delays."""


class SignOfLife:
    """A file that this rank touches as long as it lives, beside those of the others.

    Ages are differences of file times, which the file system gives: clocks of nodes do not matter.
    A rank that never began has no file, and nobody minds: it may be started at any time.

    Args:
        folder: Work folder that all ranks see.
        rank: This rank.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self._folder = folder
        self._rank = rank
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._keep_on, daemon=True)

    def _file(self, rank: int) -> Path:
        return self._folder / f"rank-{rank}.alive"

    def start(self, size: int) -> None:
        """Give the first sign; forget ranks of ``size`` that died in an earlier start."""
        self._file(self._rank).touch()
        for rank in self.silent(size):
            self._file(rank).unlink(missing_ok=True)
        self._thread.start()

    def stop(self) -> None:
        """Leave: from now on this rank is not waited for."""
        self._end.set()
        self._thread.join()
        self._file(self._rank).unlink(missing_ok=True)

    def _keep_on(self) -> None:
        while not self._end.wait(SIGN_SECONDS):
            try:
                self._file(self._rank).touch()
            except FileNotFoundError:  # the result is published, its work folder removed
                return

    def silent(self, size: int) -> list[int]:
        """Return the ranks of ``size`` that began and gave no sign for ``SILENT_SECONDS``."""
        now = self._time(self._rank)
        if now is None:
            return []
        times = {rank: self._time(rank) for rank in range(size)}
        return [r for r, time in times.items() if time is not None and now - time > SILENT_SECONDS]

    def _time(self, rank: int) -> float | None:
        try:
            return self._file(rank).stat().st_mtime
        except FileNotFoundError:
            return None

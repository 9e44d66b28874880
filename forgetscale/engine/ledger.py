"""The ledger of a run: every decision that changed its course, in the order they were taken.

``ledger.jsonl`` is only ever appended to, also over restarts. A line is on the disk before what it
says is done, so a start after a crash can finish what was begun.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from forgetscale.artifact import fsync_path
from forgetscale.zero3 import World

LEDGER_FILE = "ledger.jsonl"


def read_ledger(path: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a ledger; a last one that a crash cut short is left out."""
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue  # cut short by a crash; what it announced was not begun
    return found


class Ledger:
    """Appends events, flushed to the disk one by one.

    Args:
        directory: Run folder.
        world: This process among all.
    """

    def __init__(self, directory: Path, world: World) -> None:
        self.path = directory / LEDGER_FILE
        self._world = world

    def note(self, event: str, **fields: Any) -> None:
        """Append an event with the time; rank 0 writes what it was given.

        Args:
            event: Short name, such as ``resumed`` or ``rolled_back``.
            fields: JSON values.

        Collective: every rank must call it.

        Raises:
            ForgetScaleError: It cannot be written.
        """
        line = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "event": event}
        self._world.on_main(lambda: self._append(json.dumps(line | fields)))

    def events(self) -> list[dict[str, Any]]:
        """Return all events, the same on every rank. Collective: every rank must call it."""
        found: list[dict[str, Any]] = self._world.on_main(lambda: read_ledger(self.path))
        return found

    def _append(self, line: str) -> None:
        new = not self.path.is_file()
        with self.path.open("a+b") as file:
            size = file.tell()
            if size:
                file.seek(size - 1)
                if file.read(1) != b"\n":  # a crash left half a line
                    file.write(b"\n")
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        if new:
            fsync_path(self.path.parent)

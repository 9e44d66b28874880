"""Progress of long work: a bar on a terminal, plain lines elsewhere and in a log file."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Progress:
    """Report done / total, rate and time left.

    On a terminal a bar is drawn; otherwise one plain line is printed every ``line_seconds``.
    The plain lines always go to ``log_path`` if one is given. Only one process should be
    ``visible``.

    Args:
        total: Units of work in all.
        label: What is being done, such as ``train``.
        unit: Name of one unit, such as ``step``.
        done: Units finished before this start (after a resume).
        log_path: Text file that receives plain lines; None for none.
        visible: False prints and logs nothing.
        line_seconds: Least time between two plain lines.
    """

    def __init__(
        self,
        total: int,
        label: str,
        *,
        unit: str = "step",
        done: int = 0,
        log_path: Path | None = None,
        visible: bool = True,
        line_seconds: float = 5.0,
    ) -> None:
        self._total = total
        self._label = label
        self._units = unit + ("es" if unit.endswith(("s", "ch")) else "s")
        self._first = done
        self._done = done
        self._log_path = log_path
        self._visible = visible
        self._line_seconds = line_seconds
        self._start = time.monotonic()
        self._last_line = 0.0
        self._bar: RichProgress | None = None

    def __enter__(self) -> Progress:
        """Start the clock and the bar."""
        self._start = time.monotonic()
        if self._visible and sys.stderr.isatty():
            self._bar = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task(
                self._label, total=self._total, completed=self._done, note=""
            )
        return self

    def update(self, done: int, note: str = "") -> None:
        """Say that ``done`` units are finished; ``note`` is shown beside them."""
        self._done = done
        if not self._visible:
            return
        if self._bar is not None:
            self._bar.update(self._task, completed=done, note=note)
        now = time.monotonic()
        if now - self._last_line >= self._line_seconds or done >= self._total:
            self._last_line = now
            self._write_line(self._line(now, note))

    def _line(self, now: float, note: str) -> str:
        elapsed = max(now - self._start, 1e-9)
        rate = (self._done - self._first) / elapsed
        left = _clock((self._total - self._done) / rate) if rate > 0 else "?"
        return (
            f"{self._label} {self._done}/{self._total} {self._units}, {rate:.3g} {self._units}/s,"
            f" {left} left" + (f", {note}" if note else "")
        )

    def _write_line(self, line: str) -> None:
        if self._log_path is not None:
            with self._log_path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        if self._bar is None:
            print(line, file=sys.stderr, flush=True)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop the bar."""
        if self._bar is not None:
            self._bar.stop()

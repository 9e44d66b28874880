"""Run commands in turn or side by side: progress on the terminal, their output in files."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from forgetscale.errors import ForgetScaleError

_PROGRESS = re.compile(r"^\w[\w /-]* \d+/\d+ ")
_TAIL_LINES = 12
_LINE_SECONDS = 10.0


class StageError(ForgetScaleError):
    """A command that a larger command started has failed."""


@dataclass(slots=True)
class Terminal:
    """Progress lines of several stages on one terminal, or plain lines elsewhere."""

    _lock: threading.Lock
    _start: float
    _width: int = 0

    @classmethod
    def open(cls) -> Terminal:
        """Start the clock."""
        return cls(threading.Lock(), time.monotonic())

    def line(self, text: str) -> None:
        """Print a line that stays."""
        seconds = int(time.monotonic() - self._start)
        with self._lock:
            self._erase()
            print(f"[{seconds // 60:2d}:{seconds % 60:02d}] {text}", file=sys.stderr, flush=True)

    def transient(self, text: str) -> None:
        """Show a line that the next one replaces (terminals only)."""
        with self._lock:
            self._erase()
            width = shutil.get_terminal_size().columns - 1
            self._width = min(len(text), width)
            print(text[:width], end="\r", file=sys.stderr, flush=True)

    def _erase(self) -> None:
        if self._width:
            print(" " * self._width, end="\r", file=sys.stderr)
            self._width = 0


def free_port() -> int:
    """Return a port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def forgetscale_command(arguments: Sequence[str], ranks: int) -> list[str]:
    """Return the command line of a ForgetScale command on ``ranks`` processes of this machine."""
    if ranks == 1:
        return [sys.executable, "-m", "forgetscale", *arguments]
    launcher = Path(sys.executable).with_name("deepspeed")
    return [
        sys.executable,
        str(launcher),
        "--num_accelerators",
        str(ranks),
        "--master_port",
        str(free_port()),
        "--module",
        "forgetscale",
        *arguments,
    ]


def run_stage(
    label: str, command: Sequence[str], log_path: Path, terminal: Terminal, *, threads: int
) -> float:
    """Run one command; its output goes to ``log_path``, its progress to the terminal.

    Args:
        label: What the user sees.
        command: Program and arguments.
        log_path: File that receives everything the command prints.
        terminal: Where progress is shown.
        threads: Threads per process of the command.

    Returns:
        Seconds it took.

    Raises:
        StageError: The command failed; the message holds the end of its output.
    """
    start = time.monotonic()
    log_path.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }
    tail: deque[str] = deque(maxlen=_TAIL_LINES)
    shown = 0.0
    interactive = sys.stderr.isatty()
    with (
        log_path.open("a", encoding="utf-8") as log,
        subprocess.Popen(
            list(command),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
            text=True,
            errors="replace",
        ) as process,
    ):
        try:
            assert process.stdout is not None
            for line in process.stdout:
                log.write(line)
                tail.append(line)
                if _PROGRESS.match(line) and interactive:
                    terminal.transient(f"        {label}: {line.strip()}")
                elif _PROGRESS.match(line) and time.monotonic() - shown > _LINE_SECONDS:
                    shown = time.monotonic()
                    terminal.line(f"{label}: {line.strip()}")
            code = process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
    seconds = time.monotonic() - start
    if code != 0:
        raise StageError(
            f"{label} failed with exit code {code}; its log is {log_path} and ends with:\n"
            + "".join(tail)
        )
    terminal.line(f"{label}: {seconds:.0f} s")
    return seconds

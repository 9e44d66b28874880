"""Notice that a run hangs, say which rank stands where, and end it instead of waiting for ever.

Each process says where it is (``beat``): a few attribute writes. A thread beside it writes that to
``heartbeat/rank-NNNNN.json`` in the run folder, which all nodes share, and looks at how long the
last beat is ago. All ranks pass the same beats in the same order, so the rank with the fewest is
the one that the others wait for; a knock at each other host's port tells whether a link is cut
instead (``forgetscale.links``). The thread ends the process with ``os._exit``: its main thread sits
in a collective that never returns and cannot be asked. Files are written by a thread of their own,
so that a shared folder that no longer answers does not keep a process alive.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from forgetscale.links import Door, describe_cuts, silent_hosts

HEARTBEAT_FOLDER = "heartbeat"
SLOW_FACTOR = 4.0
"""How much longer slow phases may take: the first step, saves, evaluation, calibration, export."""
EXIT_CODE = 1
_REFRESH_SECONDS = 10.0
_SUSPENDED_SECONDS = 5.0
_KNOCK_SECONDS = 2.0
_REPORT_SECONDS = 30.0
"""How long a report may take before the process ends without one."""
_MAX_ROWS = 16


def stacks_file(folder: Path, rank: int) -> Path:
    """Return where the stacks of a rank go."""
    return folder / "logs" / f"stacks-rank-{rank:05d}.txt"


class Watchdog:
    """Where this process is, and the thread that watches it once ``watch`` was called."""

    def __init__(self) -> None:
        self.phase_seconds: dict[str, float] = {}
        """Seconds spent in each phase since they were last taken."""
        self._beats = 0
        self._steps = 0
        self._state: tuple[int, str, bool, float] = (0, "start", True, time.monotonic())
        self._step = 0
        self._rows: Iterable[Any] = ()
        self._forgiven = 0.0
        self._threads: list[threading.Thread] = []
        self._closed = threading.Event()
        self._saying = threading.Lock()
        self._door: Door | None = None
        self._silent_hosts: list[str] = []

    # ---- what the main thread says ------------------------------------------------------

    def beat(self, phase: str, *, slow: bool = False) -> None:
        """Say that something new begins.

        Args:
            phase: What, such as ``optimizer``.
            slow: It may take ``SLOW_FACTOR`` times as long as a part of a step.
        """
        _, last, _, since = self._state
        now = time.monotonic()
        self.phase_seconds[last] = self.phase_seconds.get(last, 0.0) + now - since
        self._beats += 1
        self._state = (self._beats, phase, slow or self._steps < 2, now)

    def alive(self, phase: str) -> None:
        """Say that slow work goes on which ranks do not share evenly, such as reading files."""
        beats, _, _, _ = self._state
        self._state = (beats, phase, True, time.monotonic())

    def begin_step(self, step: int, phase: str) -> None:
        """Say that a training step begins, with its first phase."""
        self._steps += 1
        self._step = step
        self.beat(phase)

    def batch(self, rows: Iterable[Any]) -> None:
        """Say which rows the step trains on; they are turned into text only if it hangs."""
        self._rows = rows

    def take_seconds(self) -> dict[str, float]:
        """Return the seconds spent in each phase since the last call."""
        found, self.phase_seconds = self.phase_seconds, {}
        return found

    # ---- the thread ---------------------------------------------------------------------

    def watch(
        self, folder: Path, *, rank: int, size: int, limit_seconds: float, log_path: Path
    ) -> None:
        """Start to watch.

        Args:
            folder: Run folder, shared by all nodes.
            rank: The rank of this process.
            size: Number of ranks.
            limit_seconds: Longest time between two beats of a step, > 0.
            log_path: Log file that gets the report.

        Raises:
            OSError: The run folder cannot be written, or no port can be opened.
        """
        self._folder, self._rank, self._size = folder, rank, size
        self._limit, self._log_path = limit_seconds, log_path
        self._tick = min(1.0, limit_seconds / 4)
        (folder / HEARTBEAT_FOLDER).mkdir(parents=True, exist_ok=True)
        stacks_file(folder, rank).parent.mkdir(parents=True, exist_ok=True)
        self._said_path(rank).unlink(missing_ok=True)
        if rank == 0:
            self._claim().unlink(missing_ok=True)
        self._door = Door()
        for name, work in (("heartbeat", self._keep_saying), ("watchdog", self._run)):
            thread = threading.Thread(target=work, name=name, daemon=True)
            thread.start()
            self._threads.append(thread)

    def close(self) -> None:
        """End the threads and remove this rank's heartbeat."""
        if not self._threads:
            return
        self._closed.set()
        for thread in self._threads:
            thread.join()
        self._threads = []
        if self._door is not None:
            self._door.close()
        self._said_path(self._rank).unlink(missing_ok=True)

    def _run(self) -> None:
        last = time.monotonic()
        while not self._closed.wait(self._tick):
            now = time.monotonic()
            if now - last > self._tick + _SUSPENDED_SECONDS:
                # The whole process stood still (a suspended job); its main thread is not to blame.
                self._forgiven = now
            last = now
            if self._stood() > self._allowed():
                self._end()

    def _keep_saying(self) -> None:
        written = (-1, 0.0)
        while not self._closed.wait(self._tick):
            beats, now = self._state[0], time.monotonic()
            if beats != written[0] or now - written[1] > _REFRESH_SECONDS:
                self._say_where()
                written = (beats, now)

    def _stood(self) -> float:
        return time.monotonic() - max(self._state[3], self._forgiven)

    def _allowed(self) -> float:
        return self._limit * (SLOW_FACTOR if self._state[2] else 1.0)

    def _said_path(self, rank: int) -> Path:
        return self._folder / HEARTBEAT_FOLDER / f"rank-{rank:05d}.json"

    def _claim(self) -> Path:
        return self._folder / HEARTBEAT_FOLDER / "reported"

    def _say_where(self) -> None:
        beats, phase, _, _ = self._state
        place = {
            "rank": self._rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "beats": beats,
            "phase": phase,
            "stood": round(self._stood(), 1),
            "step": self._step,
            "rows": [int(row) for row in self._rows][:_MAX_ROWS],
            "door": None if self._door is None else self._door.address,
            "silent_hosts": self._silent_hosts,
        }
        path = self._said_path(self._rank)
        temporary = path.with_suffix(".tmp")
        with self._saying:
            temporary.write_text(json.dumps(place), encoding="utf-8")
            temporary.replace(path)

    def _places(self) -> list[dict[str, Any]]:
        """Return where each rank is; of ranks that say nothing only the number."""
        found: list[dict[str, Any]] = []
        newest = self._said_path(self._rank).stat().st_mtime
        for rank in range(self._size):
            path = self._said_path(rank)
            try:
                place = json.loads(path.read_bytes())
                place["silent"] = newest - path.stat().st_mtime
            except (OSError, ValueError):
                place = {"rank": rank, "beats": -1}
            found.append(place)
        return found

    def _end(self) -> None:
        """Write stacks and, on one rank, the report; then end the process."""
        patience = threading.Timer(_REPORT_SECONDS, self._end_without_report)
        patience.daemon = True
        patience.start()
        self._say_where()
        with stacks_file(self._folder, self._rank).open("w", encoding="utf-8") as file:
            faulthandler.dump_traceback(file=file, all_threads=True)
        time.sleep(3 * self._tick)  # until all ranks have said where they stand
        self._knock()
        try:
            os.close(os.open(self._claim(), os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            time.sleep(3 * self._tick)  # a launcher ends all when the first ends
        else:
            text = report(self._places(), self._stood(), self._allowed(), self._folder)
            print(text, file=sys.stderr, flush=True)
            with self._log_path.open("a", encoding="utf-8") as file:
                file.write(text + "\n")
        finally:
            os._exit(EXIT_CODE)

    def _knock(self) -> None:
        """Say which other hosts give no answer, and wait until all ranks have."""
        if self._door is None:
            return
        doors = [place["door"] for place in self._places() if place.get("door")]
        here = self._door.address[0]
        others = [(host, port) for host, port in doors if host != here]
        if others:
            begun = time.monotonic()
            self._silent_hosts = sorted(silent_hosts(others, _KNOCK_SECONDS))
            self._say_where()
            time.sleep(max(0.0, _KNOCK_SECONDS - (time.monotonic() - begun)) + 3 * self._tick)

    def _end_without_report(self) -> None:
        print(
            f"forgetscale: error (rank {self._rank}): no progress for {self._stood():.0f} s in"
            f" '{self._state[1]}' of step {self._step} on {socket.gethostname()}, and"
            f" {self._folder} does not answer; the run ends, start the same command again to"
            " resume.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(EXIT_CODE)


def _line(place: dict[str, Any]) -> str:
    if place["beats"] < 0:
        return f"  rank {place['rank']:<5d} said nothing at all"
    rows = ", ".join(str(row) for row in place["rows"]) or "none yet"
    silent = place["silent"]
    quiet = f"; silent for {silent:.0f} s" if silent > 2 * _REFRESH_SECONDS else ""
    return (
        f"  rank {place['rank']:<5d} {place['host']}  step {place['step']}, {place['phase']},"
        f" for {place['stood']:.0f} s; last rows {rows}{quiet}"
    )


def report(places: list[dict[str, Any]], stood: float, allowed: float, folder: Path) -> str:
    """Return the sentence that names who is behind, and one line a rank.

    Args:
        places: What the ranks said, by rank.
        stood: Seconds without progress.
        allowed: Seconds that were allowed.
        folder: Run folder.
    """
    fewest = min(place["beats"] for place in places)
    behind = [place for place in places if place["beats"] == fewest]
    if len(behind) == len(places):
        who = f"all {len(places)} ranks stand" if len(places) > 1 else "rank 0 stands"
    else:
        ranks = ", ".join(str(place["rank"]) for place in behind)
        who = f"the others wait for rank {ranks}, which stands"
    where = "nowhere known"
    if fewest >= 0:
        where = f"in '{behind[0]['phase']}' of step {behind[0]['step']} on {behind[0]['host']}"
    cuts = describe_cuts(places)
    links = "" if cuts is None else f"; {cuts}"
    return "\n".join(
        [
            f"forgetscale: error: no progress for {stood:.0f} s ({allowed:.0f} s allowed by"
            f" train.watchdog_s): {who} {where}{links}; the run ends, stacks are in"
            f" {folder / 'logs'}; start the same command again to resume.",
            *(_line(place) for place in places),
        ]
    )

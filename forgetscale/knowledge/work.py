"""Stages of work over parts, shared by local processes and by any number of independent ranks.

There are no collectives: a part's result is a file that appears whole or not at all, in a folder
that all ranks see. So a killed job goes on where it stopped, with any number of processes, and a
rank waits for others by looking; of one that was killed it hears nothing more, and stops.
"""

from __future__ import annotations

import contextlib
import fcntl
import multiprocessing
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from forgetscale.artifact import fsync_path
from forgetscale.errors import CheckpointError, ForgetScaleError
from forgetscale.knowledge.sign_of_life import SILENT_SECONDS, SignOfLife
from forgetscale.progress import Progress

Arrays = dict[str, np.ndarray]
POLL_SECONDS = 0.2


def start_process() -> None:
    """Set up a worker process: parts are the parallelism, so tensors use one thread."""
    torch.set_num_threads(1)


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays so that a reader sees no file or the whole one."""
    temporary = path.with_name(f".{path.name}.tmp-{secrets.token_hex(4)}")
    names = list(arrays)
    try:
        with temporary.open("wb") as file:
            # Names hold slashes and dots, which member names of an archive should not.
            stored = {f"a{index}": arrays[name] for index, name in enumerate(names)}
            np.savez(file, names=np.array(names, dtype=np.str_), **stored)  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load_arrays(path: Path) -> Arrays:
    """Read what ``save_arrays`` wrote."""
    with np.load(path, allow_pickle=False) as file:
        return {str(name): file[f"a{index}"] for index, name in enumerate(file["names"])}


@contextlib.contextmanager
def until_published(result: Path, rank: int) -> Iterator[None]:
    """Let a rank end quietly that finds the work folder gone because rank 0 has published.

    Args:
        result: What rank 0 publishes before it removes the work folder.
        rank: This rank.
    """
    try:
        yield
    except OSError:
        if rank == 0 or not result.exists():
            raise


class Results:
    """Results of a finished stage, read one part at a time, in order."""

    def __init__(self, folder: Path, count: int) -> None:
        self._folder = folder
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __contains__(self, item: object) -> bool:
        return any(item is arrays for arrays in self)

    def __iter__(self) -> Iterator[Arrays]:
        return (load_arrays(part_file(self._folder, part)) for part in range(self._count))


def part_file(folder: Path, part: int) -> Path:
    """Return the file of a part's result."""
    return folder / f"part-{part:06d}.npz"


def _run_part(
    work: Callable[..., Arrays], path: Path, part: int, arguments: tuple[Any, ...]
) -> None:
    save_arrays(path, work(part, *arguments))


def _with(arguments: tuple[Any, ...], own: Sequence[Any] | None, part: int) -> tuple[Any, ...]:
    return arguments if own is None else (*arguments, own[part])


@dataclass(slots=True)
class Crew:
    """This rank's processes and its place among independent ranks.

    Args:
        folder: Work folder of the job, seen by all ranks.
        rank: This rank, 0-based.
        size: Number of ranks; each does every ``size``-th part.
        workers: Local processes, >= 1; 1 works in this one.
        visible: Show progress.
    """

    folder: Path
    rank: int = 0
    size: int = 1
    workers: int = 1
    visible: bool = True
    _pool: ProcessPoolExecutor | None = None
    _lock: IO[str] | None = None
    _sign: SignOfLife | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time of each finished stage."""

    def __enter__(self) -> Crew:
        """Take the rank's lock and start its processes."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._failed(self.rank).unlink(missing_ok=True)
        self._lock = (self.folder / f"rank-{self.rank}.lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise CheckpointError(
                f"{self.folder} is being worked on by another process of rank {self.rank}; wait"
                " for it, or give each rank its own --rank."
            ) from error
        if self.size > 1:
            self._sign = SignOfLife(self.folder, self.rank)
            self._sign.start(self.size)
        if self.workers > 1:
            # Not forked from here, where torch may have threads: from a clean process that has
            # imported everything once.
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["forgetscale.knowledge.restore"])
            start = time.monotonic()
            self._pool = ProcessPoolExecutor(self.workers, context, start_process)
            # Imports take seconds: a stage of their own, not a part of the first pass.
            wait([self._pool.submit(torch.get_num_threads) for _ in range(self.workers)])
            self.seconds["start"] = time.monotonic() - start
        return self

    def __exit__(self, kind: type[BaseException] | None, value: Any, trace: Any) -> None:
        """Stop the processes; tell other ranks of a failure."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        if isinstance(value, Exception) and self.size > 1:
            known = isinstance(value, ForgetScaleError | OSError)
            with contextlib.suppress(OSError):  # the failure itself may be a full disk
                text = str(value) if known else repr(value)
                self._failed(self.rank).write_text(text, encoding="utf-8")
        if self._sign is not None:
            self._sign.stop()
        if self._lock is not None:
            self._lock.close()

    def _failed(self, rank: int) -> Path:
        return self.folder / f"rank-{rank}.failed"

    def run(
        self,
        stage: str,
        work: Callable[..., Arrays],
        count: int,
        arguments: tuple[Any, ...] = (),
        own: Sequence[Any] | None = None,
    ) -> Results:
        """Do every part of a stage that is not done, and wait until all ranks have done theirs.

        Args:
            stage: Name, as shown and as its folder.
            work: Importable function of (part, *arguments, own[part]).
            count: Parts of the stage over all ranks.
            arguments: Same for all parts.
            own: One more argument for each part; None for none.
        """
        start = time.monotonic()
        folder = self.folder / stage
        folder.mkdir(exist_ok=True)
        mine = range(self.rank, count, self.size)
        todo = [part for part in mine if not part_file(folder, part).is_file()]
        with Progress(
            count, stage, unit="part", done=self._done(folder), visible=self.visible
        ) as progress:
            for _ in self._finish(folder, work, [(p, _with(arguments, own, p)) for p in todo]):
                progress.update(self._done(folder))
            self.wait_for(lambda: self._done(folder) == count)
            progress.update(count)
        fsync_path(folder)
        self.seconds[stage] = time.monotonic() - start
        return Results(folder, count)

    def everyone(self, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        """Let every process of this rank do the same work, which they divide by themselves.

        Args:
            work: Importable function of (*arguments, visible); one process shows progress.
            arguments: Same for all.
        """
        if self._pool is None:
            work(*arguments, visible=self.visible)
            return
        waiting: set[Future[None]] = {
            self._pool.submit(work, *arguments, visible=self.visible and number == 0)
            for number in range(self.workers)
        }
        while waiting:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()

    def _done(self, folder: Path) -> int:
        return sum(name.startswith("part-") for name in os.listdir(folder))

    def _finish(
        self,
        folder: Path,
        work: Callable[..., Arrays],
        todo: list[tuple[int, tuple[Any, ...]]],
    ) -> Iterator[None]:
        if self._pool is None:
            for part, arguments in todo:
                _run_part(work, part_file(folder, part), part, arguments)
                yield
            return
        waiting: set[Future[None]] = set()
        for part, arguments in todo:
            # A few ahead, so that a failure stops the rest.
            while len(waiting) >= 2 * self.workers:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
            path = part_file(folder, part)
            waiting.add(self._pool.submit(_run_part, work, path, part, arguments))
        while waiting:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()

    def wait_for(self, is_ready: Callable[[], bool]) -> None:
        """Look until something is there that another rank makes.

        Raises:
            CheckpointError: Another rank failed, or began and gives no sign of life.
        """
        while not is_ready():
            silent = [] if self._sign is None else self._sign.silent(self.size)
            if silent:
                raise CheckpointError(
                    f"rank {', '.join(map(str, silent))} gave no sign of life for"
                    f" {SILENT_SECONDS:g} s in {self.folder}; this rank stops, start all again:"
                    " they go on where they stopped."
                )
            for rank in range(self.size):
                path = self._failed(rank)
                if rank != self.rank and path.is_file():
                    raise CheckpointError(
                        f"rank {rank} failed: {path.read_text(encoding='utf-8')}; this rank stops,"
                        " start all again."
                    )
            time.sleep(POLL_SECONDS)

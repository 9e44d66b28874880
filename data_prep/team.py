"""The processes of a build: one alone, a pool on this machine, or ranks under MPI.

Processes never wait for each other's messages. They share a folder: work is handed over by renaming
files, and each wait looks whether the others still live. MPI gives rank, size and one broadcast.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import Any

from forgetscale.errors import ConfigError, ForgetScaleError

_BEAT_SECONDS = 5.0
_SILENCE_SECONDS = 180.0
_LAUNCHERS = (
    ("PMI_SIZE", "mpiexec"),
    ("OMPI_COMM_WORLD_SIZE", "mpiexec"),
    ("MPI_LOCALNRANKS", "mpiexec"),
    ("SLURM_STEP_NUM_TASKS", "srun"),
)


@dataclass
class Team:
    """The processes of a build as one of them sees it; alone unless a subclass says otherwise.

    Attributes:
        rank: Number of this process; rank 0 merges and publishes.
        num_workers: Processes that do units.
        works: Whether this one does units.
        token: Name of this start, the same in all processes.
    """

    rank: int = 0
    num_workers: int = 1
    works: bool = True
    token: str = ""

    def __post_init__(self) -> None:
        """Choose a name for this start."""
        self.token = self.token or secrets.token_hex(6)

    def start(self, folder: Path, order: Any) -> None:
        """Let the others begin with ``order``; ``folder`` is where signs of life are kept."""

    def check(self) -> None:
        """Look whether the other processes live.

        Raises:
            ForgetScaleError: One of them ended early.
        """

    def finish(self) -> None:
        """Wait until no other process needs the shared folder any more."""

    def close(self) -> None:
        """End what was started."""


class Pool(Team):
    """Spawned processes on this machine; the parent (rank 0) merges, the children do units.

    Args:
        num_workers: Children, >= 1.
        target: What a child runs: ``target(order, team)``.
    """

    def __init__(self, num_workers: int, target: Callable[[Any, Team], None]) -> None:
        super().__init__(0, num_workers, False)
        self._target = target
        self._children: list[Any] = []
        self._pipes: list[Any] = []

    def start(self, folder: Path, order: Any) -> None:
        """Spawn the children."""
        context = get_context("spawn")
        for rank in range(1, self.num_workers + 1):
            receiver, sender = context.Pipe(duplex=False)
            team = Team(rank, self.num_workers, True, self.token)
            child = context.Process(
                target=_run_child, args=(self._target, order, team, sender), daemon=True
            )
            child.start()
            sender.close()
            self._children.append(child)
            self._pipes.append(receiver)

    def check(self) -> None:
        """Raise what a child raised, or say that it was killed."""
        for child, pipe in zip(self._children, self._pipes, strict=True):
            code = child.exitcode
            if code in (None, 0):
                continue
            try:
                error: ForgetScaleError | OSError = pipe.recv()
            except EOFError:
                how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
                raise ForgetScaleError(
                    f"process {child.pid} of {self.num_workers} {how} (often for lack of memory);"
                    " start the same command again, finished units are kept, or use fewer"
                    " --num-processes."
                ) from None
            raise error

    def close(self) -> None:
        """End children that still run."""
        for child in self._children:
            if child.is_alive():
                child.terminate()
            child.join()
        for pipe in self._pipes:
            pipe.close()


def _run_child(target: Callable[[Any, Team], None], order: Any, team: Team, pipe: Any) -> None:
    for number in (signal.SIGINT, signal.SIGUSR1):  # the parent decides
        signal.signal(number, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = parent_process()
    assert parent is not None
    sentinel = parent.sentinel
    threading.Thread(target=lambda: (connection.wait([sentinel]), os._exit(1)), daemon=True).start()
    try:
        target(order, team)
    except (ForgetScaleError, OSError) as error:
        pipe.send(error)
        sys.exit(1)
    except BaseException:
        traceback.print_exc()
        sys.exit(1)


class MpiTeam(Team):
    """Ranks started by ``mpiexec`` or ``srun`` that share a file system; all do units."""

    def __init__(self, world: Any) -> None:
        super().__init__(world.Get_rank(), world.Get_size(), True)
        self._world = world
        self._folder: Path | None = None
        self._ended = threading.Event()
        self._next_check = 0.0
        self.order: Any = None
        self.started = False

    def start(self, folder: Path | None, order: Any) -> None:
        """Send token, folder and order from rank 0 to all; begin to give signs of life."""
        self.token, self._folder, self.order = self._world.bcast((self.token, folder, order))
        if self._folder is None:
            error = ForgetScaleError("rank 0 cannot begin; it says why.")
            error.exit_code, error.said_elsewhere = self.order, True
            raise error
        self.started = True
        sys.excepthook = self._end_all
        self._folder.mkdir(parents=True, exist_ok=True)
        self._beat()
        threading.Thread(target=self._beat_on, daemon=True).start()

    def refuse(self, code: int) -> None:
        """Tell the others, who wait in ``start``, that there is nothing to do: exit ``code``."""
        if not self.started:
            self._world.bcast(("", None, code))

    def _end_all(self, kind: Any, error: Any, trace: Any) -> None:
        traceback.print_exception(kind, error, trace)
        self.abort(1)

    def _beat(self) -> None:
        assert self._folder is not None
        (self._folder / f"{self.rank:05d}").write_text(socket.gethostname())

    def _beat_on(self) -> None:
        while not self._ended.wait(_BEAT_SECONDS):
            try:
                self._beat()
            except OSError:
                return  # the folder is gone, the build has ended

    def check(self) -> None:
        """Raise if a rank gave no sign of life for long, by the clock of the file system."""
        if self._folder is None or time.monotonic() < self._next_check:
            return
        self._next_check = time.monotonic() + _BEAT_SECONDS
        names = os.listdir(self._folder)
        own = self._folder / f"{self.rank:05d}"
        for name in names:
            try:
                silence = own.stat().st_mtime - (self._folder / name).stat().st_mtime
            except FileNotFoundError:
                continue
            if silence > _SILENCE_SECONDS and f"{name}.done" not in names and "." not in name:
                host = (self._folder / name).read_text()
                raise ForgetScaleError(
                    f"rank {int(name)} on {host} gave no sign of life for {silence:.0f} s; start"
                    " the same command again, finished units are kept."
                )

    def finish(self) -> None:
        """Say that this rank is ready; rank 0 waits for all, as it removes the shared folder."""
        assert self._folder is not None
        (self._folder / f"{self.rank:05d}.done").touch()
        if self.rank == 0:
            done = [self._folder / f"{rank:05d}.done" for rank in range(self.num_workers)]
            wait_for(lambda: all(path.exists() for path in done), self)
        self.close()

    def close(self) -> None:
        """Stop the signs of life."""
        self._ended.set()

    def abort(self, code: int) -> None:
        """End all ranks at once with exit code ``code``."""
        sys.stderr.flush()
        self._world.Abort(code)


def wait_for(ready: Callable[[], bool], team: Team) -> None:
    """Wait until ``ready()`` is true, as long as the team lives."""
    pause = 0.005
    while not ready():
        team.check()
        time.sleep(pause)
        pause = min(pause * 1.5, 0.25)


def mpi_team() -> MpiTeam | None:
    """Return the team of this start if a launcher started several processes, else None.

    Raises:
        ConfigError: mpi4py is missing, or sees another number of processes than the launcher.
    """
    started = [
        (name, launcher, int(os.environ[name]))
        for name, launcher in _LAUNCHERS
        if os.environ.get(name, "").isdigit()
    ]
    _, launcher, expected = max(started, key=lambda entry: entry[2], default=("", "", 1))
    if expected <= 1:
        return None
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise ConfigError(
            f"{launcher} started {expected} processes but mpi4py does not load"
            f" ({' '.join(str(error).split())[:200]}); install forgetscale[mpi] or start one"
            " process without it."
        ) from error
    world = MPI.COMM_WORLD
    if world.Get_size() != expected and (world.Get_size() == 1 or launcher == "mpiexec"):
        library = MPI.Get_library_version().split("\n")[0].strip("\0 ")
        raise ConfigError(
            f"{launcher} started {expected} processes but mpi4py sees {world.Get_size()}: its"
            f" library ({library}) is not that of the launcher; use the mpiexec that belongs to it"
            " (forgetscale[mpi] brings one), srun --mpi=pmi2, or build mpi4py against the"
            " launcher's MPI."
        )
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return MpiTeam(world)

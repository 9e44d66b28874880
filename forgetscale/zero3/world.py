"""Start DeepSpeed quietly and talk to the other ranks."""

from __future__ import annotations

import contextlib
import datetime
import importlib
import logging
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from forgetscale.errors import ForgetScaleError, ShardError, StoppedEarly
from forgetscale.stop import StopRequest
from forgetscale.watchdog import Watchdog
from forgetscale.zero3.floor import require_torch

T = TypeVar("T")
TIMEOUT_MINUTES = 10


def launcher_rank() -> int:
    """Return this process's rank as the launcher set it, 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def launcher_world_size() -> int:
    """Return the number of processes the launcher started, 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextlib.contextmanager
def _stdout_to(stream: Any) -> Iterator[None]:
    saved = sys.stdout
    sys.stdout = stream
    try:
        yield
    finally:
        sys.stdout = saved


class _Once(logging.Filter):
    """Let each message through a single time.

    Python's own "once" forgets whenever any code enters ``warnings.catch_warnings``, which torch
    does all the time: a deprecation in a collective would be logged at every step.
    """

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Say whether the message is new."""
        text = record.getMessage()
        new = text not in self._seen
        self._seen.add(text)
        return new


def import_deepspeed(log_path: Path) -> None:
    """Import DeepSpeed with everything it prints sent to ``log_path``.

    DeepSpeed binds its logger to the standard output it finds when imported, so a redirection
    during the import is enough for the life of the process.
    """
    log_path.parent.mkdir(parents=True, exist_ok=True)
    stream = log_path.open("a", encoding="utf-8", buffering=1)
    logging.captureWarnings(True)
    warnings.simplefilter("once")
    handler = logging.StreamHandler(stream)
    handler.addFilter(_Once())
    logging.getLogger("py.warnings").addHandler(handler)
    logging.getLogger("py.warnings").propagate = False
    with _stdout_to(stream):
        importlib.import_module("deepspeed")
        torch_comm: Any = importlib.import_module("deepspeed.comm.torch")
    for name in ("DeepSpeed", "deepspeed"):
        for old in logging.getLogger(name).handlers:
            if isinstance(old, logging.StreamHandler):
                old.setStream(stream)
    # On CPU DeepSpeed would compile a shared-memory all-reduce at start, which needs a C++
    # compiler on every node and serves only reductions that ZeRO-3 does not make.
    torch_comm.build_shm_op = lambda: None


@dataclass(frozen=True, slots=True)
class World:
    """This process among all processes of the run."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    stop: StopRequest = field(default_factory=StopRequest)
    """Whether this process was asked to stop."""
    watchdog: Watchdog = field(default_factory=Watchdog)
    """Where this process is, for the report of a hang."""

    @property
    def is_main(self) -> bool:
        """True on the rank that writes shared files and talks to the terminal."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all ranks. Collective: every rank must call it."""
        dist.barrier()

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum of ``value`` over ranks. Collective: every rank must call it."""
        result = value.detach().to(self.device, copy=True)
        dist.all_reduce(result, op=dist.ReduceOp.SUM)
        return result.to(value.device)

    def stop_if_asked(self, when: str) -> None:
        """Raise on all ranks if any was asked to stop. Collective: every rank must call it.

        Args:
            when: What is given up, such as ``during calibration``.

        Raises:
            StoppedEarly: A rank was.
        """
        self.watchdog.beat(when, slow=True)
        if float(self.sum(torch.tensor(float(self.stop.requested)))):
            raise StoppedEarly(f"stopped on request {when}; start the same command again to go on.")

    def gather_objects(self, value: Any) -> list[Any]:
        """Return every rank's picklable value, by rank. Collective: every rank must call it."""
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's picklable value. Collective: every rank must call it."""
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def agree(self, error: BaseException | None) -> None:
        """Raise on all ranks if any rank brings an error. Collective: every rank must call it.

        Without this a rank that fails alone leaves the others waiting in the next collective.

        Raises:
            ForgetScaleError: The own error if there is one, else a sentence naming the rank.
        """
        found = self.gather_objects(None if error is None else (type(error), str(error)))
        if error is not None:
            raise error
        for rank, item in enumerate(found):
            if item is not None:
                kind, message = item
                wanted = kind if issubclass(kind, ForgetScaleError) else ShardError
                copy = wanted(f"rank {rank} failed: {message}")
                copy.said_elsewhere = True
                raise copy

    def on_main(self, work: Callable[[], T]) -> T:
        """Do ``work`` on rank 0; return its picklable value, or raise its error, on all ranks.

        Collective: every rank must call it.
        """
        result, error = None, None
        if self.is_main:
            try:
                result = work()
            except ForgetScaleError as found:
                error = found
            except OSError as found:
                error = ForgetScaleError(
                    f"{found.filename or 'a file'} cannot be read or written"
                    f" ({found.strerror or found}); free space or mend the file system."
                )
        failure = None if error is None else (type(error), str(error))
        result, failure = self.broadcast((result, failure))
        if error is not None:
            raise error
        if failure is not None:
            kind, message = failure
            copy = kind(message)
            copy.said_elsewhere = True
            raise copy
        return cast(T, result)


def start_world(log_path: Path) -> World:
    """Join the process group the launcher describes, or make one of a single process.

    Args:
        log_path: File that receives DeepSpeed's and Python's log noise of this process.

    Collective: every rank must call it.

    Raises:
        ForgetScaleError: The port is taken, or not all ranks came.
    """
    require_torch()
    import_deepspeed(log_path)
    import deepspeed

    rank, size = launcher_rank(), launcher_world_size()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    init_method = None
    if "MASTER_ADDR" not in os.environ:
        # One process and no launcher: a file store needs no port.
        folder = tempfile.mkdtemp(prefix="forgetscale-store-")
        init_method = f"file://{folder}/store"
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    try:
        deepspeed.init_distributed(
            "nccl" if gpu else "gloo",
            auto_mpi_discovery=False,
            verbose=False,
            timeout=datetime.timedelta(minutes=TIMEOUT_MINUTES),
            init_method=init_method,
            rank=rank,
            world_size=size,
        )
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "connectFullMesh" not in str(error):
            raise
        place = f"{os.environ['MASTER_ADDR']}:{os.environ.get('MASTER_PORT', '')}"
        first = str(error).splitlines()[0].rstrip(".")
        raise ForgetScaleError(
            f"rank {rank} cannot join the {size} ranks of the run at {place} ({first}); give the"
            " launcher a free --master_port and check that the nodes reach each other."
        ) from error
    return World(rank, size, local_rank, device)


_LOST_PEER = re.compile(
    r"connection (closed|reset) by peer|broken pipe|timed out waiting|socket timeout"
    r"|remote process exited|watchdog caught collective",
    re.IGNORECASE,
)


_PEER_ADDRESS = re.compile(r"\[([0-9a-fA-F.:]+)\]:\d+")
"""Where gloo names the host at the other end."""


def lost_peer(error: BaseException) -> ShardError | None:
    """Return one sentence if a collective failed because another rank is gone, else None.

    Args:
        error: What the collective raised; the backends tell the case by their text alone.
    """
    if not isinstance(error, RuntimeError) or not _LOST_PEER.search(str(error)):
        return None
    address = _PEER_ADDRESS.search(str(error))
    where = "" if address is None else f" at {address[1]}"
    return ShardError(
        f"rank {launcher_rank()} lost contact with a rank{where}, which ended or hangs; all ranks"
        " stop; see the logs for the first error, then start the same command again to resume."
    )


def stop_world() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()

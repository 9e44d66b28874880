"""Who works on which shard: epochs as fencing tokens, no clock shared by machines.

The lease of a shard is a file per epoch, ``shard-00012.epoch-0003``; the highest epoch owns the
shard. Taking a shard means creating the file of the next epoch, which succeeds for one worker only
(a hard link to a complete file never replaces another). The owner alone rewrites its own file, with
a counter that grows while it works. Another worker takes a shard over when

- the file says that it was released, or
- the owner was a process of this machine and is gone, or
- the counter has not changed for ``lease_seconds`` on the observer's own monotonic clock.

So clocks of different machines are never compared; a clock that jumps does no harm. A worker that
was thought dead but lives finds the next epoch's file and gives up; should it seal first all the
same, nothing is lost either, because a sealed file is complete whoever wrote it, and only one of
two can be the first.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_NAME = re.compile(r"^shard-(\d+)\.epoch-(\d+)$")


def process_identity(pid: int | None = None) -> dict[str, Any] | None:
    """Return what names a process of this machine for as long as it lives; None if it is gone.

    Args:
        pid: Process; None for this one.
    """
    number = os.getpid() if pid is None else pid
    try:
        stat = Path(f"/proc/{number}/stat").read_text()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    if fields[0] in "ZX":
        return None
    return {"pid": number, "started": fields[19], "boot": boot, "space": space}


def is_gone(identity: dict[str, Any] | None) -> bool:
    """Return whether a process is certainly gone: it was of this machine and runs no more."""
    own = process_identity()
    if identity is None or own is None:
        return False
    if identity["boot"] != own["boot"] or identity["space"] != own["space"]:
        return False
    return process_identity(identity["pid"]) != identity


def create_whole(path: Path, data: bytes) -> bool:
    """Create ``path`` with ``data``, all or nothing, unless it exists.

    Returns:
        False if it exists.
    """
    temporary = path.with_name(f".{path.name}.tmp-{secrets.token_hex(6)}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
    finally:
        temporary.unlink(missing_ok=True)
    return True


@dataclass(slots=True)
class Lease:
    """A shard that this worker owns until another one takes the next epoch."""

    shard: int
    epoch: int
    directory: Path
    worker: str
    beat: int = 0

    @property
    def path(self) -> Path:
        """Its file."""
        return self.directory / lease_name(self.shard, self.epoch)

    def is_current(self) -> bool:
        """Return whether nobody has taken the shard over."""
        return not (self.directory / lease_name(self.shard, self.epoch + 1)).exists()

    def show_life(self) -> None:
        """Count one up, so that others see that this worker lives."""
        self.beat += 1
        self._write(released=False)

    def release(self) -> None:
        """Give the shard back, so that others need not wait."""
        self._write(released=True)

    def content(self, *, released: bool) -> bytes:
        """Return what stands in the file."""
        return json.dumps(
            {
                "worker": self.worker,
                "beat": self.beat,
                "released": released,
                "process": process_identity(),
            }
        ).encode()

    def _write(self, *, released: bool) -> None:
        temporary = self.path.with_name(f".{self.path.name}.tmp-{secrets.token_hex(6)}")
        try:
            temporary.write_bytes(self.content(released=released))
            temporary.replace(self.path)
        finally:
            temporary.unlink(missing_ok=True)


def lease_name(shard: int, epoch: int) -> str:
    """Return the name of a lease file."""
    return f"shard-{shard:06d}.epoch-{epoch:04d}"


def highest_epochs(directory: Path) -> dict[int, int]:
    """Return the owner's epoch of each shard that has a lease."""
    found: dict[int, int] = {}
    for name in os.listdir(directory):
        if match := _NAME.match(name):
            shard, epoch = int(match[1]), int(match[2])
            found[shard] = max(epoch, found.get(shard, 0))
    return found


def read_lease(directory: Path, shard: int, epoch: int) -> dict[str, Any] | None:
    """Return what stands in a lease file, None if it is gone or no lease."""
    try:
        value = json.loads((directory / lease_name(shard, epoch)).read_bytes())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


@dataclass(slots=True)
class LeaseTable:
    """The leases of a run as one worker sees them.

    Attributes:
        directory: Folder of lease files.
        worker: Name of this worker.
        lease_seconds: How long a counter may stand still, > 0.
        clock: Monotonic seconds of this machine.
    """

    directory: Path
    worker: str
    lease_seconds: float
    clock: Callable[[], float] = time.monotonic
    _seen: dict[tuple[int, int], tuple[int, float]] = field(default_factory=dict)

    def acquire(self, shard: int, epoch: int) -> Lease | None:
        """Try to own a shard.

        Args:
            shard: Its number.
            epoch: Highest epoch there is, 0 if there is no lease (see ``highest_epochs``).

        Returns:
            The lease, or None if another worker has it.
        """
        if epoch and not self._is_free(shard, epoch):
            return None
        lease = Lease(shard, epoch + 1, self.directory, self.worker)
        return lease if create_whole(lease.path, lease.content(released=False)) else None

    def _is_free(self, shard: int, epoch: int) -> bool:
        content = read_lease(self.directory, shard, epoch)
        if content is None:
            if not (self.directory / lease_name(shard, epoch)).exists():
                return True  # gone since the folder was listed: the shard was sealed
            # A machine that lost power may leave an empty file; it counts as one that stands still.
            content = {"released": False, "process": None, "beat": -1}
        if content["released"] or is_gone(content["process"]):
            return True
        now = self.clock()
        beat, since = self._seen.get((shard, epoch), (None, now))
        if beat != content["beat"]:
            self._seen[shard, epoch] = (content["beat"], now)
            return False
        return now - since >= self.lease_seconds

    def remove(self, shard: int) -> None:
        """Remove all lease files of a sealed shard."""
        for name in os.listdir(self.directory):
            match = _NAME.match(name)
            if match and int(match[1]) == shard:
                (self.directory / name).unlink(missing_ok=True)

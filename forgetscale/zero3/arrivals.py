"""Names the rank that does not come to a call in which all ranks take part.

A collective that one rank never enters hangs on all others and says nothing, or ends after many
minutes with the address of a socket. Here every rank counts the calls it enters in a store of its
own; a thread on each rank looks at the counts when a call takes too long. The rank with the lowest
count is the one the others wait for.
"""

from __future__ import annotations

import datetime
import os
import sys
import threading
import time
from collections.abc import Callable

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from forgetscale.zero3.world import World

_MOST_SECONDS = 5.0
"""Longest pause between two looks."""


def end_process(sentence: str) -> None:
    """Say why and end this process at once; a thread cannot end a call that hangs."""
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    os._exit(1)


class ArrivalWatch:
    """Watches over calls that all ranks must enter equally often.

    Args:
        world: This process among all.
        limit_seconds: How much longer than that a call may take, > 0.
        end: Told the sentence that names the late ranks; ends the process.

    Collective: every rank must make one.
    """

    def __init__(
        self, world: World, limit_seconds: float, *, end: Callable[[str], None] = end_process
    ) -> None:
        self._rank, self._size, self._limit = world.rank, world.size, limit_seconds
        self._end = end
        host = os.environ["MASTER_ADDR"]
        patience = datetime.timedelta(seconds=60)
        if world.is_main:
            self._store = TCPStore(
                host, 0, is_master=True, wait_for_workers=False, timeout=patience
            )
        port = world.broadcast(self._store.port if world.is_main else None)
        if not world.is_main:
            self._store = TCPStore(host, port, wait_for_workers=False, timeout=patience)
        self._count = 0
        self._what = ""
        self._since: float | None = None
        self._store.set(self._key(self._rank), "0")
        world.barrier()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, name="arrivals", daemon=True)
        self._thread.start()

    @staticmethod
    def _key(rank: int) -> str:
        return f"arrivals/{rank}"

    def arrive(self, what: str) -> None:
        """Say that this rank enters the next call.

        Args:
            what: Its name, such as ``a forward pass``.
        """
        self._count += 1
        self._what = what
        self._store.set(self._key(self._rank), str(self._count))
        self._since = time.monotonic()

    def rest(self) -> None:
        """Say that this rank is in no call; what comes next may take as long as it likes."""
        self._since = None

    def close(self) -> None:
        """End the watch."""
        self._stop.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._stop.wait(min(self._limit / 4, _MOST_SECONDS)):
            since = self._since
            if since is None or time.monotonic() - since < self._limit:
                continue
            sentence = self._sentence()
            if sentence is not None:
                self._end(sentence)
                return

    def _sentence(self) -> str | None:
        """Return what is wrong; None on the rank that others wait for."""
        try:
            counts = [int(self._store.get(self._key(rank))) for rank in range(self._size)]
        except RuntimeError:  # rank 0, which keeps the counts, is gone
            return (
                f"rank {self._rank} waits in {self._what} for more than {self._limit:g} s and rank"
                " 0 is gone; see its log, then start the same command again."
            )
        if max(counts) > counts[self._rank]:
            return None
        late = [str(rank) for rank, count in enumerate(counts) if count < max(counts)]
        where = f"call {max(counts)}, {self._what}"
        if late:
            return (
                f"rank {self._rank} waits in {where}, for more than {self._limit:g} s; rank"
                f" {', '.join(late)} did not arrive (at call {min(counts)}); see the log of that"
                " rank, then start the same command again."
            )
        return (
            f"all ranks arrived at {where}, but it has not ended for {self._limit:g} s; look at the"
            " network between the nodes, or raise the limit if one pass may take that long."
        )

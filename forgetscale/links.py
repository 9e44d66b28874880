"""Which hosts can still be reached: what tells a cut link from a process that hangs.

Each process holds a port open for the length of a run and never takes anything from it. The kernel
answers who connects there even while the process is stopped, so an answer says that the host and
the way to it are sound, and silence that they are not.
"""

from __future__ import annotations

import errno
import os
import selectors
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Address = tuple[str, int]
"""IP address and port."""


def own_address() -> str:
    """Return the IP address of this host on the way to the first rank's host.

    Raises:
        OSError: There is no such way.
    """
    master = os.environ.get("MASTER_ADDR", "127.0.0.1")
    family, kind, _, _, place = socket.getaddrinfo(master, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(place)  # sends nothing
        return str(probe.getsockname()[0])


class Door:
    """A port that others may knock at.

    Raises:
        OSError: No port can be opened.
    """

    def __init__(self) -> None:
        host = own_address()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.create_server((host, 0), family=family, backlog=socket.SOMAXCONN)
        self.address: Address = (host, int(self._socket.getsockname()[1]))

    def close(self) -> None:
        """Close the port."""
        self._socket.close()


def silent_hosts(doors: Iterable[Address], seconds: float) -> set[str]:
    """Return the IP addresses of hosts that gave no answer.

    Args:
        doors: Where to knock; one door of each host is tried.
        seconds: How long to wait for all of them together, > 0.
    """
    waiting: dict[socket.socket, str] = {}
    silent: set[str] = set()
    deadline = time.monotonic() + seconds
    try:
        with selectors.DefaultSelector() as selector:
            for host, port in dict(doors).items():
                family = socket.AF_INET6 if ":" in host else socket.AF_INET
                knock = socket.socket(family, socket.SOCK_STREAM)
                waiting[knock] = host
                knock.setblocking(False)
                code = knock.connect_ex((host, port))
                if code == errno.EINPROGRESS:
                    selector.register(knock, selectors.EVENT_WRITE)
                elif not _answered(code):
                    silent.add(host)
            while selector.get_map() and (left := deadline - time.monotonic()) > 0:
                for key, _ in selector.select(left):
                    knock = key.fileobj  # type: ignore[assignment]
                    selector.unregister(knock)
                    if not _answered(knock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)):
                        silent.add(waiting[knock])
            silent |= {waiting[key.fileobj] for key in selector.get_map().values()}  # type: ignore[index]
    finally:
        for knock in waiting:
            knock.close()
    return silent


def _answered(code: int) -> bool:
    # Refused: the process is gone, but its host said so.
    return code in (0, errno.ECONNREFUSED)


def describe_cuts(places: Sequence[Mapping[str, Any]]) -> str | None:
    """Return which hosts do not reach each other, None if all do.

    Args:
        places: Of each rank that said something: ``rank``, ``host``, ``door`` (its address) and
            ``silent_hosts`` (IP addresses that gave it no answer).
    """
    ranks: dict[str, list[int]] = {}
    hosts: dict[str, str] = {}
    pairs: set[tuple[str, str]] = set()
    for place in places:
        if not place.get("door"):
            continue
        here = str(place["door"][0])
        ranks.setdefault(here, []).append(int(place["rank"]))
        hosts[here] = str(place["host"])
        for there in place.get("silent_hosts", ()):
            pairs.add((min(here, there), max(here, there)))
    if not pairs:
        return None

    def name(address: str) -> str:
        if address not in ranks:
            return address
        numbers = ", ".join(str(rank) for rank in ranks[address])
        word = "rank" if len(ranks[address]) == 1 else "ranks"
        return f"{hosts[address]} ({address}, {word} {numbers})"

    common = set.intersection(*(set(pair) for pair in pairs))
    if len(pairs) > 1 and len(common) == 1:
        return f"{name(common.pop())} is cut off from the others"
    texts = [f"{name(a)} and {name(b)} do not reach each other" for a, b in sorted(pairs)]
    return "; ".join(texts)

"""Hosts with networks of their own on one machine, and the link between them, which can be cut."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

DEVICE = "eth0"


def why_no_hosts() -> str | None:
    """Return why this machine makes no network namespaces, or None."""
    if sys.platform != "linux":
        return "network namespaces are Linux's"
    for program in ("ip", "unshare"):
        if shutil.which(program) is None:
            return f"{program} is not installed (iproute2, util-linux)"
    if os.geteuid() != 0:
        return "making network namespaces needs root"
    name = f"forgetscale-{os.getpid()}-try"
    made = _ip("netns", "add", name, check=False)
    if made.returncode:
        return f"ip netns add failed: {made.stderr.strip()}"
    _ip("netns", "delete", name)
    return None


def _ip(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if check and done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr}")
    return done


class TwoHosts:
    """Two namespaces with a cable between them; the files are those of this machine."""

    names = ("host-a", "host-b")
    addresses = ("10.99.7.1", "10.99.7.2")

    def __init__(self) -> None:
        self._spaces = [f"forgetscale-{os.getpid()}-{name}" for name in self.names]
        cable = [f"fs{os.getpid()}{end}" for end in "ab"]
        for space in self._spaces:
            _ip("netns", "add", space)
        _ip("link", "add", cable[0], "type", "veth", "peer", "name", cable[1])
        for space, end, address in zip(self._spaces, cable, self.addresses, strict=True):
            _ip("link", "set", end, "netns", space)
            _ip("-n", space, "link", "set", end, "name", DEVICE)
            _ip("-n", space, "addr", "add", f"{address}/24", "dev", DEVICE)
            _ip("-n", space, "link", "set", "lo", "up")
            _ip("-n", space, "link", "set", DEVICE, "up")

    def start(
        self, host: int, command: list[str], log: Path, **environment: str
    ) -> subprocess.Popen:
        """Start a program on a host."""
        named = f'hostname {self.names[host]}; exec "$@"'
        inside = ["ip", "netns", "exec", self._spaces[host], "unshare", "--uts"]
        with log.open("w") as file:
            return subprocess.Popen(
                [*inside, "bash", "-c", named, "bash", *command],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ | environment,
            )

    def cut(self) -> None:
        """Pull the cable: no packet arrives, no connection is closed."""
        _ip("-n", self._spaces[1], "link", "set", DEVICE, "down")

    def mend(self) -> None:
        """Put it back."""
        _ip("-n", self._spaces[1], "link", "set", DEVICE, "up")

    def close(self) -> None:
        """Remove the hosts."""
        for space in self._spaces:
            _ip("netns", "delete", space, check=False)

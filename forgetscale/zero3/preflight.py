"""What nodes ask of each other before a job: same software, same slots, shared folder, links.

No DeepSpeed and no launcher: one process a node, started by ``srun``, with a TCP store on the first
node. Everything that can go wrong on a node is reported by its name, on one line.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from forgetscale.errors import ConfigError, ForgetScaleError

PACKAGES = ("torch", "deepspeed", "transformers", "forgetscale")
TIMEOUT_SECONDS = 120.0
SHARED_SECONDS = 30.0
"""How long a file may take to appear on another node (network file systems cache listings)."""
MESSAGE_BYTES = 1 << 20
NUM_EXCHANGES = 5
NUM_PORTS = 200


@dataclass(frozen=True, slots=True)
class NodeReport:
    """What one node found about itself.

    Attributes:
        name: Its name in SLURM.
        versions: Python and packages.
        num_processes: Processes it will run.
        gpus: Name and free bytes of each GPU of the job.
        free_bytes: Free space of the shared folder's file system.
        clock: Seconds since the epoch, when the report was made.
        problems: What is wrong, in words.
    """

    name: str
    versions: Mapping[str, str]
    num_processes: int
    gpus: Sequence[tuple[str, int]]
    free_bytes: int
    clock: float
    problems: Sequence[str] = ()


def find_free_port(first: int) -> int:
    """Return the first port from ``first`` on that nothing listens on, on this machine.

    Raises:
        ConfigError: None of ``NUM_PORTS`` ports is free.
    """
    for port in range(first, first + NUM_PORTS):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise ConfigError(
        f"{socket.gethostname()}: ports {first} to {first + NUM_PORTS - 1} are all taken; end what"
        " holds them or choose another node."
    )


def inspect_node(name: str, num_processes: int, shared: Path) -> NodeReport:
    """Look at this node.

    Args:
        name: Its name in SLURM.
        num_processes: Processes the job will run on it, >= 1.
        shared: Folder that all nodes must see.
    """
    versions = {"python": platform.python_version()}
    problems = []
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "missing"
            problems.append(f"{package} is not installed")
    gpus = []
    for index in range(torch.cuda.device_count()):
        free, _ = torch.cuda.mem_get_info(index)
        gpus.append((torch.cuda.get_device_name(index), free))
        ones = torch.ones(256, 256, device=f"cuda:{index}")
        if float((ones @ ones).sum()) != 256.0**3:
            problems.append(f"GPU {index} multiplies wrongly")
    if gpus and num_processes > len(gpus):
        problems.append(f"{num_processes} processes for {len(gpus)} GPUs")
    problems += _memory_errors()
    if shared.is_dir():
        free_bytes = shutil.disk_usage(shared).free
    else:
        free_bytes = 0
        problems.append(f"{shared} is no folder there")
    return NodeReport(name, versions, num_processes, gpus, free_bytes, time.time(), problems)


def _memory_errors() -> list[str]:
    """Return uncorrected memory errors that ``nvidia-smi`` counts; none where it is not there."""
    program = shutil.which("nvidia-smi")
    if program is None or not torch.cuda.is_available():
        return []
    query = "--query-gpu=index,ecc.errors.uncorrected.volatile.total"
    found = subprocess.run(
        [program, query, "--format=csv,noheader"], capture_output=True, text=True, timeout=60
    )
    if found.returncode:
        return [f"nvidia-smi failed ({found.stderr.strip() or found.stdout.strip()})"]
    rows = [line.split(", ") for line in found.stdout.splitlines()]
    # A card without ECC says [N/A].
    return [
        f"GPU {row[0]} has {row[1]} uncorrected memory errors"
        for row in rows
        if len(row) == 2 and row[1].isdigit() and int(row[1])
    ]


def differences(reports: Sequence[NodeReport]) -> list[str]:
    """Return how nodes differ from the first one, a sentence each."""
    first = reports[0]
    found = []
    for report in reports[1:]:
        for what, version in report.versions.items():
            if version != first.versions[what]:
                found.append(
                    f"{report.name} has {what} {version}, {first.name} has {first.versions[what]}"
                )
        if len(report.gpus) != len(first.gpus):
            found.append(
                f"{report.name} has {len(report.gpus)} GPUs, {first.name} has {len(first.gpus)}"
            )
        if report.num_processes != first.num_processes:
            found.append(
                f"{report.name} starts {report.num_processes} processes, {first.name}"
                f" {first.num_processes}"
            )
    return found


def rounds_of_pairs(size: int) -> list[list[tuple[int, int]]]:
    """Return rounds in which every node meets one other at most; over all rounds each pair once."""
    places: list[int | None] = [*range(size), *([None] if size % 2 else [])]
    rounds = []
    for _ in range(len(places) - 1):
        half = len(places) // 2
        facing = zip(places[:half], reversed(places[half:]), strict=True)
        rounds.append(
            [(min(a, b), max(a, b)) for a, b in facing if a is not None and b is not None]
        )
        places = [places[0], places[-1], *places[1:-1]]
    return rounds


class Nodes:
    """This node among all nodes of the job.

    Args:
        rank: Number of this node.
        size: Nodes of the job.
        master: Address of the first node.
        port: Free port there.

    Raises:
        ForgetScaleError: The first node cannot be reached.
    """

    def __init__(self, rank: int, size: int, master: str, port: int) -> None:
        self.rank, self.size = rank, size
        limit = datetime.timedelta(seconds=TIMEOUT_SECONDS)
        try:
            self._store = dist.TCPStore(  # type: ignore[attr-defined]
                master, port, size, rank == 0, timeout=limit
            )
        except (RuntimeError, ValueError) as error:
            first = str(error).splitlines()[0]
            raise ForgetScaleError(
                f"node {rank} cannot reach {master}:{port} ({first}); check that nodes of the job"
                " may open connections to each other, or name another first node."
            ) from error

    def gather(self, key: str, value: Any) -> list[Any]:
        """Return every node's value, by number. Collective: every node must call it.

        Raises:
            ForgetScaleError: A node did not answer; it is named by its number.
        """
        self._store.set(f"{key}/{self.rank}", json.dumps(value))
        found = []
        for rank in range(self.size):
            try:
                found.append(json.loads(self._store.get(f"{key}/{rank}")))
            except (RuntimeError, dist.DistStoreError) as error:
                raise ForgetScaleError(
                    f"node {rank} of {self.size} gave no answer ({key}) within"
                    f" {TIMEOUT_SECONDS:.0f} s; look at it with scontrol show node."
                ) from error
        return found

    def leave(self) -> None:
        """Part; the first node holds the store until all others have. Every node must call it."""
        self._store.set(f"end/{self.rank}", "1")
        if self.rank == 0:
            self._store.wait([f"end/{rank}" for rank in range(self.size)])

    def sees_shared_folder(self, shared: Path) -> str | None:
        """Return None if a file of node 0 is seen here, else what is wrong.

        Collective: every node must call it.
        """
        path = shared / f".forgetscale-preflight-{os.environ.get('SLURM_JOB_ID', 'local')}"
        text = f"{time.time_ns()}"
        if self.rank == 0:
            path.write_text(text, encoding="utf-8")
        wanted = self.gather("shared/written", text)[0]
        problem = None
        deadline = time.monotonic() + SHARED_SECONDS
        while not path.is_file() or path.read_text(encoding="utf-8") != wanted:
            if time.monotonic() > deadline:
                problem = f"{shared} is not the same folder as on the first node"
                break
            time.sleep(0.2)
        self.gather("shared/read", problem)
        if self.rank == 0:
            path.unlink()
        return problem

    def measure_links(self) -> list[tuple[int, int, float]]:
        """Sum 1 MiB over each pair of nodes; return pairs with the median seconds it took.

        Collective: every node must call it.

        Raises:
            ForgetScaleError: A sum is wrong, or a pair does not connect.
        """
        gpu = torch.cuda.is_available()
        device = torch.device("cuda", 0) if gpu else torch.device("cpu")
        dist.init_process_group(
            "nccl" if gpu else "gloo",
            store=dist.PrefixStore("links", self._store),  # type: ignore[attr-defined]
            rank=self.rank,
            world_size=self.size,
            timeout=datetime.timedelta(seconds=TIMEOUT_SECONDS),
        )
        mine = []
        try:
            for pairs in rounds_of_pairs(self.size):
                for a, b in pairs:
                    if self.rank in (a, b):
                        other = b if self.rank == a else a
                        seconds = self._sum_with(other, device)
                        if self.rank == a:
                            mine.append((a, b, seconds))
        except RuntimeError as error:
            raise ForgetScaleError(
                f"node {self.rank} lost a link to another node ({str(error).splitlines()[0]});"
                " look at the network between the nodes of the job."
            ) from error
        finally:
            dist.destroy_process_group()
        return [tuple(link) for links in self.gather("links/found", mine) for link in links]

    def _sum_with(self, other: int, device: torch.device) -> float:
        ours = torch.full((MESSAGE_BYTES // 4,), float(self.rank + 1), device=device)
        theirs = torch.empty_like(ours)
        seconds = []
        for _ in range(NUM_EXCHANGES):
            start = time.perf_counter()
            work = dist.batch_isend_irecv(
                [dist.P2POp(dist.isend, ours, other), dist.P2POp(dist.irecv, theirs, other)]
            )
            for part in work:
                part.wait()
            total = float((ours + theirs).sum())
            seconds.append(time.perf_counter() - start)
            if not math.isclose(total, ours.numel() * (self.rank + other + 2)):
                raise ForgetScaleError(
                    f"nodes {self.rank} and {other} sum to {total}, expected"
                    f" {ours.numel() * (self.rank + other + 2)}; a link or a GPU is broken."
                )
        return sorted(seconds)[len(seconds) // 2]


def as_json(report: NodeReport) -> dict[str, Any]:
    """Return a report as a JSON object."""
    return asdict(report)


def from_json(values: Mapping[str, Any]) -> NodeReport:
    """Return the report that ``as_json`` was given."""
    gpus = [(str(name), int(free)) for name, free in values["gpus"]]
    return NodeReport(**{**values, "gpus": gpus})


if __name__ == "__main__":
    print(find_free_port(int(sys.argv[1])))

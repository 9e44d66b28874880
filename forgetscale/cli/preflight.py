"""Look at every node before a job: software, slots, shared folder, GPUs, links between nodes.

Started once a node by srun (launch/slurm.sh does it); prints one line a node and fails with the
name of the node that is not as it must be.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from forgetscale.errors import ConfigError
from forgetscale.zero3.preflight import (
    NodeReport,
    Nodes,
    as_json,
    differences,
    from_json,
    inspect_node,
)

EXAMPLES = """examples:
  srun --ntasks-per-node=1 python -m forgetscale preflight --processes 8 --shared runs \\
    --master 10.0.0.1:29500
"""
GIB = 2**30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument(
        "--processes", type=int, default=1, metavar="N", help="processes the job runs on a node"
    )
    parser.add_argument(
        "--shared", type=Path, default=Path("."), metavar="DIR", help="folder all nodes must see"
    )
    parser.add_argument(
        "--master", required=True, metavar="HOST:PORT", help="first node and a free port there"
    )
    parser.add_argument(
        "--min-free-gib", type=float, default=1.0, metavar="X", help="least free space there"
    )


def _place(environment: Mapping[str, str]) -> tuple[int, int, str]:
    try:
        rank, size = int(environment["SLURM_NODEID"]), int(environment["SLURM_JOB_NUM_NODES"])
    except (KeyError, ValueError):
        raise ConfigError(
            "preflight runs once a node inside a SLURM job (SLURM_NODEID and SLURM_JOB_NUM_NODES"
            " are not set); start it with srun --ntasks-per-node=1, or use launch/slurm.sh."
        ) from None
    return rank, size, environment.get("SLURMD_NODENAME", f"node {rank}")


def describe(report: NodeReport, slowest: str) -> str:
    """Return a node's line."""
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    gpus = "no GPU"
    if report.gpus:
        free = min(free for _, free in report.gpus) / GIB
        gpus = f"{len(report.gpus)} x {report.gpus[0][0]}, {free:.0f} GiB free each"
    state = "; ".join(report.problems) or "ok"
    return (
        f"{report.name}: {state} | {versions} | {report.num_processes} processes | {gpus} |"
        f" {report.free_bytes / GIB:.0f} GiB disk | {slowest}"
    )


def _slowest_of(rank: int, names: Sequence[str], links: Sequence[tuple[int, int, float]]) -> str:
    own = [(seconds, b if a == rank else a) for a, b, seconds in links if rank in (a, b)]
    if not own:
        return "alone"
    seconds, other = max(own)
    return f"slowest link {seconds * 1e3:.1f} ms a MiB with {names[other]}"


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    rank, size, name = _place(os.environ)
    host, _, port = options.master.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"--master must be HOST:PORT, got {options.master!r}.")
    mine = inspect_node(name, options.processes, options.shared)
    nodes = Nodes(rank, size, host, int(port))
    seen = nodes.sees_shared_folder(options.shared) if options.shared.is_dir() else None
    extra = [] if seen is None else [seen]
    if mine.free_bytes < options.min_free_gib * GIB:
        extra.append(
            f"{mine.free_bytes / GIB:.1f} GiB free at {options.shared}, {options.min_free_gib:g}"
            " needed"
        )
    values = as_json(mine) | {"problems": [*mine.problems, *extra]}
    reports = [from_json(value) for value in nodes.gather("report", values)]
    wrong = [f"{report.name}: {text}" for report in reports for text in report.problems]
    wrong += differences(reports)
    links = nodes.measure_links() if size > 1 and not wrong else []
    if rank == 0:
        names = [report.name for report in reports]
        for number, report in enumerate(reports):
            print(describe(report, _slowest_of(number, names, links)), flush=True)
    nodes.leave()
    if wrong:
        raise ConfigError(f"preflight: {'; '.join(wrong)}; mend or exclude these nodes.")

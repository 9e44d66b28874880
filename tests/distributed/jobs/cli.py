"""The command line as a process runs it."""

from __future__ import annotations

import os
from unittest import mock

from forgetscale.cli import main
from forgetscale.zero3 import preflight


def run(arguments: list[str]) -> None:
    """Run a command and end with its exit code."""
    raise SystemExit(main(arguments))


def look_at_nodes(shared: list[str], processes: list[int], port: int) -> None:
    """Run the preflight as a node of a SLURM job of as many nodes as ranks.

    Args:
        shared: Of each node, the folder it takes for the shared one.
        processes: Of each node, how many processes it would start.
        port: Free port of this machine.
    """
    rank = int(os.environ["RANK"])
    os.environ |= {"SLURM_NODEID": str(rank), "SLURM_JOB_NUM_NODES": str(len(shared))}
    os.environ |= {"SLURMD_NODENAME": f"n{rank + 1}", "SLURM_JOB_ID": "7"}
    place = ["--shared", shared[rank], "--master", f"127.0.0.1:{port}"]
    with mock.patch.object(preflight, "SHARED_SECONDS", 0.5):
        run(["preflight", "--processes", str(processes[rank]), *place])

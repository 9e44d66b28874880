"""Jobs that test the rank server itself."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import torch
import torch.distributed as dist


def hang(rank: int) -> None:
    """Wait in a collective that one rank never joins."""
    if dist.get_rank() == rank:
        time.sleep(600)
    dist.barrier()


def add_ranks() -> dict[str, Any]:
    """Return the sum of rank numbers, as each rank sees it."""
    value = torch.tensor([float(dist.get_rank())])
    dist.all_reduce(value)
    return {"sum": value.item(), "process": os.getpid()}


def fail(rank: int, how: str) -> None:
    """End one rank in some way."""
    if dist.get_rank() == rank and how == "signal":
        os.kill(os.getpid(), signal.SIGKILL)
    if dist.get_rank() == rank and how == "error":
        raise ValueError("a rank's own error")
    dist.barrier()

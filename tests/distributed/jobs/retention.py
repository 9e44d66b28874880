"""Jobs that end a run inside a roll-back."""

from __future__ import annotations

import os
import signal
from typing import Any
from unittest import mock

import torch.distributed as dist

from forgetscale.checkpoint import CheckpointStore
from tests.distributed.jobs import training


def train_and_die(recipe: dict, after: str) -> None:
    """Train; the last rank dies when checkpoints are to be removed, or when they are."""
    original = CheckpointStore.remove_after

    def remove_after(self: Any, step: int) -> None:
        if after == "the removal":
            original(self, step)
        dist.barrier()
        if dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.barrier()

    with mock.patch.object(CheckpointStore, "remove_after", remove_after):
        training.command(recipe)

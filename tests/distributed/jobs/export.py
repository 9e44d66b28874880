"""Jobs that write exports."""

from __future__ import annotations

import argparse
import errno
from pathlib import Path
from typing import Any
from unittest import mock

import safetensors.torch
import torch
import torch.distributed as dist

import forgetscale.cli.export as export_command
from forgetscale.checkpoint import export_model
from forgetscale.config import validate_recipe
from forgetscale.engine.start import open_source, start_engine
from tests.distributed.jobs.shards import world
from tests.distributed.jobs.training import write


def sharded(recipe: dict, directory: str, max_file_bytes: int, full_on: int | None = None) -> None:
    """Export the source model in small files; the disk of one rank may be full."""
    parsed = validate_recipe(recipe)
    here = world()
    engine = start_engine(parsed, here, open_source(parsed, here), plan=None, training=False)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    original = safetensors.torch.save_file
    broken = full if full_on == dist.get_rank() else original
    with mock.patch.object(safetensors.torch, "save_file", broken):
        export_model(
            engine,
            source=parsed.model.path,
            directory=Path(directory),
            world=here,
            dtype=torch.float32,
            recipe=recipe,
            payload={},
            max_file_bytes=max_file_bytes,
        )


def command(recipe: dict, output: str) -> None:
    """Run ``forgetscale export``."""
    export_command.run(argparse.Namespace(config=write(recipe), set=[], output=Path(output)))

"""Jobs that measure Fisher information and read it back."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

import forgetscale.cli.calibrate as calibrate_command
from forgetscale.config import validate_recipe
from forgetscale.engine.start import open_source
from forgetscale.projections.basis import SLICED, FisherBasis
from tests.distributed.jobs.shards import world
from tests.distributed.jobs.training import write


def measure(recipe: dict, output: str) -> None:
    """Run ``forgetscale calibrate --kind fisher``."""
    options = argparse.Namespace(
        config=write(recipe), set=[], output=Path(output), kind="fisher", local_rank=0
    )
    calibrate_command.run(options)


def read(recipe: dict, directory: str) -> dict[str, Any]:
    """Return everything a basis holds, as a reader at this number of ranks sees it."""
    here = world()
    source = open_source(validate_recipe(recipe), here)
    basis = FisherBasis(Path(directory))
    found: dict[str, Any] = {"payload": dict(basis.payload)}
    for kind in ("diagonal", "vector", "left", "right"):
        for name in basis.names(kind):
            if kind in SLICED:
                numel = torch.Size(source.shapes[name]).numel()
                found[f"{kind}/{name}"] = basis.read(kind, name, 0, numel)
            else:
                found[f"{kind}/{name}"] = basis.side(kind, name)
            if kind != "diagonal":
                found[f"values/{kind}/{name}"] = basis.values(kind, name)
                found[f"trace/{kind}/{name}"] = basis.trace(kind, name)
    return found

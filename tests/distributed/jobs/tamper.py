"""Jobs in which a protected element changes, as a bug would change it."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor

import forgetscale.engine.loop as loop
from forgetscale.artifact import canonical_json, hash_bytes, hash_file
from forgetscale.zero3 import Matrix, Slice, ZeroEngine, ZeroShards
from tests.distributed.jobs.training import command

NAME = "model.layers.0.mlp.up_proj.weight"
PLACES = {NAME, "model.layers.0.mlp.up_proj.frozen"}


def frozen_place(shards: ZeroShards, item: Slice) -> int:
    """Return the position of a frozen element in a slice."""
    positions = torch.arange(item.length)
    return int(shards.masks[item.name].frozen_elements(positions)[-1])


def train(recipe: dict, where: str, step: int, rank: int) -> None:
    """Train; one bit of a frozen element of one rank flips.

    Args:
        recipe: The recipe.
        where: ``master``, ``working`` (the copy that forward reads) or ``export`` (on its way to
            the file).
        step: Step after which it happens.
        rank: Rank on which it happens.
    """
    original_step, original_gather = loop.train_step, ZeroEngine.gather_working

    def flip(values: Tensor, place: int) -> None:
        bits = values.view({4: torch.int32, 2: torch.int16}[values.element_size()])
        bits[place] ^= 1

    def train_step(job: Any, rows: Tensor, number: int) -> Any:
        result = original_step(job, rows, number)
        if number == step and dist.get_rank() == rank and where != "export":
            shards = job.engine.shards
            (item,) = [i for i in shards.slices if i.name in PLACES]
            values = shards.master(item) if where == "master" else item.working
            flip(values, frozen_place(shards, item))
        return result

    def gather_working(self: ZeroEngine, matrix: Matrix, destination: int) -> Tensor | None:
        whole = original_gather(self, matrix, destination)
        if matrix.name == NAME and whole is not None and where == "export":
            # The first frozen column of the first row.
            pieces = self.layout.pieces
            frozen = (
                pieces[matrix.slices[0].name].index if pieces else self.shards.masks[NAME].columns
            )
            flip(whole.view(-1), int(frozen[0]))
        return whole

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(loop, "train_step", train_step))
        stack.enter_context(mock.patch.object(ZeroEngine, "gather_working", gather_working))
        command(recipe)


def edit_checkpoint(folder: str) -> None:
    """Change all master weights of a checkpoint and make its hashes right again."""
    checkpoint = Path(folder)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    for path in checkpoint.glob("states-*.safetensors"):
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata()
        states = safetensors.torch.load_file(path)
        for name in states:
            if name.startswith("master/"):
                states[name] += 1e-3
        safetensors.torch.save_file(states, path, metadata)
        entry = manifest["files"][path.relative_to(checkpoint).as_posix()]
        entry |= {"size": path.stat().st_size, "sha256": hash_file(path)}
    del manifest["self_hash"]
    manifest["self_hash"] = hash_bytes(canonical_json(manifest))
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))

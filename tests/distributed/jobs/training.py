"""Jobs that train a recipe the way the command does, and look inside."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml

import forgetscale.cli.train as train_command
import forgetscale.engine.loop as loop
import forgetscale.engine.run as run


def write(recipe: dict, overrides: dict | None = None) -> Path:
    """Write a recipe where all ranks find it."""
    import torch.distributed as dist

    path = Path(recipe["run"]["output_dir"] + ".yaml")
    if not dist.is_initialized() or dist.get_rank() == 0:
        path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    if dist.is_initialized():
        dist.barrier()
    return path


def command(recipe: dict) -> None:
    """Run ``forgetscale train`` on a recipe."""
    train_command.run(argparse.Namespace(config=write(recipe), set=[]))


def train(recipe: dict, probe: list[list[int]] | None = None) -> dict[str, Any]:
    """Train, and return rows of each step, fp32 masters, working copies and live logits.

    Args:
        recipe: The recipe.
        probe: Token ids whose logits the live engine computes after the last step.
    """
    found: dict[str, Any] = {"rows": []}
    original_export, original_step = run.export_run, loop.train_step
    original_next = run.open_stream

    def open_stream(*args: Any, **kwargs: Any) -> Any:
        stream = original_next(*args, **kwargs)

        class Recorded:
            def __next__(self) -> Any:
                batch = next(stream)
                found["rows"].append(batch.row_ids.tolist())
                return batch

            def __getattr__(self, name: str) -> Any:
                return getattr(stream, name)

            def __setattr__(self, name: str, value: Any) -> None:
                setattr(stream, name, value)

        return Recorded()

    def export_run(
        recipe: Any, world: Any, source: Any, plan: Any, engine: Any, *rest: Any
    ) -> None:
        shards = engine.shards
        found["masters"] = whole_masters(engine)
        found["trained"] = [item.name for item in shards.slices if item.param.requires_grad]
        found["working"] = {m.name: engine.gather_working(m, 0) for m in engine.matrices()}
        if probe is not None:
            engine.set_training(False)
            with torch.no_grad():
                found["logits"] = engine(torch.tensor(probe), mode="logits").float()
        found["factors"] = shards.gather(list(engine.layout.factors()))
        found["skipped"] = engine.skipped_steps
        original_export(recipe, world, source, plan, engine, *rest)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(run, "open_stream", open_stream))
        stack.enter_context(mock.patch.object(run, "export_run", export_run))
        command(recipe)
    assert original_step is loop.train_step
    return found


def whole_masters(engine: Any) -> dict[str, torch.Tensor]:
    """Return all masters in the source model's names and shapes."""
    found = {}
    for matrix in engine.matrices():
        parts = engine.shards.gather([item.name for item in matrix.slices])
        whole = parts[matrix.slices[0].name]
        if len(parts) > 1:
            whole = torch.full(matrix.shape, float("nan"))
            for name, part in parts.items():
                engine.layout.pieces[name].put_(whole, part)
        found[matrix.name] = whole
    return found


def count_forwards(recipe: dict) -> int:
    """Train and count how often a decoder layer's first matrix is applied under gradients."""
    from transformers.models.olmo2.modeling_olmo2 import Olmo2Attention

    count = 0
    original = Olmo2Attention.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += torch.is_grad_enabled() and self.training
        return original(self, *args, **kwargs)

    with mock.patch.object(Olmo2Attention, "forward", forward):
        command(recipe)
    return count

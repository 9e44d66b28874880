"""Resolve a recipe, print it, estimate memory and time, run one mock step, stop. Writes nothing."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from forgetscale.cli.data_check import check_data
from forgetscale.cli.inputs import check_inputs
from forgetscale.cli.recipe_options import add_recipe_options, read_recipe, running_world
from forgetscale.config import HftMethodConfig, S2ftMethodConfig, dump_recipe
from forgetscale.engine.dry_run import Outlook, look_ahead, mock_steps
from forgetscale.methods import METHODS
from forgetscale.methods.hft import draw_frozen
from forgetscale.methods.s2ft import draw_plan
from forgetscale.zero3 import launcher_rank, launcher_world_size

EXAMPLES = """examples:
  forgetscale check --config run.yaml
  deepspeed --num_gpus 8 --module forgetscale check --config run.yaml
  forgetscale check --config run.yaml --no-step --world-size 64     estimates for 64 ranks
  forgetscale check --config run.yaml --data     every byte, and 10,000 interrupted runs replayed
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add_recipe_options(parser)
    parser.add_argument("--no-step", action="store_true", help="estimate only; reads no weights")
    parser.add_argument(
        "--world-size", type=int, metavar="N", help="ranks to estimate for (default: this launch)"
    )
    parser.add_argument(
        "--data",
        action="store_true",
        help="check the training data instead: hashes of every byte, each row once per epoch, and"
        " interrupted runs replayed over 1 to 8 ranks and changes of batch size",
    )
    parser.add_argument(
        "--schedules",
        type=int,
        default=10_000,
        metavar="N",
        help="interrupted runs that --data replays (default: %(default)s)",
    )


def describe(outlook: Outlook, world_size: int) -> str:
    """Return the estimates as text."""
    memory = outlook.memory
    parts = [
        ("weights", memory.weights),
        ("fp32 master weights", memory.master_weights),
        ("AdamW moments", memory.moments),
        ("gradients", memory.gradients),
        ("gradient copy in the step", memory.step_gradients),
        ("logits of one chunk", memory.logits),
        ("sum on the device", memory.device),
        ("sum in host memory (offload)", memory.host),
    ]
    tokens = outlook.num_steps * outlook.target_tokens_per_step
    lines = [
        f"parameters            {outlook.num_parameters:,}",
        f"steps                 {outlook.num_steps:,} of {outlook.target_tokens_per_step:,} target"
        f" tokens, {tokens:,} in all",
        f"operations per token  {outlook.flops_per_token:.3e},"
        f" {outlook.flops_per_token * tokens:.3e} in all",
        f"memory per rank, {world_size} ranks, activations not counted:",
        *(f"  {name:28s} {size / 1e9:10.3f} GB" for name, size in parts),
    ]
    return "\n".join(lines)


def run(options: argparse.Namespace) -> None:
    """Run the command. Collective: every rank must call it."""
    recipe = read_recipe(options)
    if options.data:
        if launcher_rank() == 0:
            check_data(recipe, options.schedules)
        return
    if not options.no_step:
        check_inputs(recipe)
    world_size = options.world_size or launcher_world_size()

    def draw(structure: Any) -> frozenset[str]:
        method = recipe.method
        if isinstance(method, HftMethodConfig):
            return draw_frozen(structure, recipe.run.seed, method.frozen_fraction)
        if isinstance(method, S2ftMethodConfig):
            _, whole = draw_plan(
                structure,
                recipe.run.seed,
                trainable_fraction=method.trainable_fraction,
                variant=method.variant,
                ends=method.ends,
            )
            return whole
        return frozenset()

    outlook = look_ahead(recipe, world_size, draw)
    if launcher_rank() == 0:
        print(dump_recipe(recipe))
        print(describe(outlook, world_size), flush=True)
    if options.no_step:
        return
    method = METHODS[recipe.method.kind](recipe.method)
    with tempfile.TemporaryDirectory(prefix="forgetscale-check-") as folder:
        with running_world(Path(folder)) as (world, _):
            trial = mock_steps(recipe, method, world)
    if launcher_rank() == 0:
        hours = outlook.num_steps * trial.step_seconds / 3600
        print(
            f"mock step             loss {trial.loss:.4f}, {trial.step_seconds:.3f} s,"
            f" {outlook.target_tokens_per_step / trial.step_seconds:,.0f} target tokens/s,"
            f" peak {trial.memory_bytes / 1e9:.3f} GB; about {hours:.2f} h in all",
            flush=True,
        )
    sys.stdout.flush()

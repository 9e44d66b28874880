"""Resolve a recipe, print it, estimate memory and time, run one mock step, stop. Writes nothing."""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from forgetscale.api import Method
from forgetscale.cli.data_check import check_data
from forgetscale.cli.inputs import check_inputs
from forgetscale.cli.preemption import rehearse
from forgetscale.cli.recipe_options import add_recipe_options, read_recipe, running_world
from forgetscale.cli.stages import forgetscale_command
from forgetscale.config import Recipe, dump_recipe
from forgetscale.engine.dry_run import Outlook, Trial, look_ahead, mock_steps
from forgetscale.engine.protection import Protection
from forgetscale.errors import ConfigError
from forgetscale.methods import METHODS
from forgetscale.zero3 import launcher_rank, launcher_world_size

EXAMPLES = """examples:
  forgetscale check --config run.yaml
  deepspeed --num_gpus 8 --module forgetscale check --config run.yaml
  forgetscale check --config run.yaml --no-step --world-size 64     estimates for 64 ranks
  forgetscale check --config run.yaml --no-step --json              the same for scripts
  forgetscale check --config run.yaml --preemption --ranks 8     stops a short run in every phase
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
        "--device",
        choices=["cuda", "cpu"],
        help="where training will compute (default: here; with --no-step cuda)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object (bytes, operations) and no text"
    )
    parser.add_argument(
        "--data",
        action="store_true",
        help="check the training data instead: hashes of every byte, each row once per epoch, and"
        " interrupted runs replayed over 1 to 8 ranks and changes of batch size",
    )
    parser.add_argument(
        "--preemption",
        action="store_true",
        help="train four steps in a scratch folder instead, stopped by SIGUSR1 once in every phase;"
        " shows how long it took to be safe",
    )
    parser.add_argument(
        "--ranks", type=int, default=1, metavar="N", help="processes that --preemption starts here"
    )
    parser.add_argument(
        "--notice",
        type=float,
        default=120.0,
        metavar="SECONDS",
        help="what --preemption must keep to (default: %(default)s)",
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
    state, kept = memory.state, memory.protection
    host = " (host)" if state.offloaded else ""
    again = memory.refresh.device if memory.refresh else 0
    passing = again + memory.micro_batch >= memory.step
    parts = [
        ("weights", state.weights),
        (f"fp32 master weights{host}", state.masters),
        (f"AdamW moments{host}", state.moments),
        (f"gradients{host}", state.gradients),
        *([(f"gradients to step with{host}", state.step_gradients)] if state.offloaded else []),
        ("gradient bucket", memory.bucket),
        ("buffers of the model", memory.buffers),
        *([("frozen source model", memory.reference)] if memory.reference else []),
        *([(f"anchors (source weights){host}", kept.anchors)] if kept.anchors else []),
        *([(f"Fisher basis{host}", kept.basis)] if kept.basis else []),
        *([("model of a refresh", memory.refresh.device)] if memory.refresh else []),
        ("gathered parameters", memory.gathered),
        ("activations", memory.activations),
        ("loss", memory.loss),
        ("gradients of the pass", memory.backward),
        ("copies in the step", memory.step),
    ]
    tokens = outlook.num_steps * outlook.target_tokens_per_step
    share = outlook.num_frozen / outlook.num_parameters
    pass_name = "a refresh" if memory.refresh else "forward and backward"
    peak = pass_name if passing else "the optimizer's step"
    lines = [
        f"parameters            {outlook.num_parameters:,}",
        f"freeze plan           {outlook.num_frozen:,} frozen ({share:.2%}), layout"
        f" {outlook.layout}; plan {outlook.plan_source}",
        *([_adapter_line(outlook)] if outlook.num_adapter else []),
        f"steps                 {outlook.num_steps:,} of {outlook.target_tokens_per_step:,} target"
        f" tokens, {tokens:,} in all",
        f"operations per token  {outlook.flops_per_token:.3e} needed,"
        f" {outlook.executed_flops_per_token:.3e} executed,"
        f" {outlook.flops_per_token * tokens:.3e} needed in all",
        f"memory per rank, {world_size} ranks:",
        *(f"  {name:31s} {size / 1e9:10.3f} GB" for name, size in parts),
        f"  {'peak on the device':31s} {memory.device / 1e9:10.3f} GB, in {peak}",
    ]
    if kept.disk:
        lines.append(f"Fisher basis on disk   {kept.disk / 1e9:10.3f} GB, all ranks together")
    if memory.copies:
        lines.append(f"  {'copies for checkpoints (host)':31s} {memory.copies / 1e9:10.3f} GB")
    if memory.host:
        lines.append(f"  {'in host memory':31s} {memory.host / 1e9:10.3f} GB")
    return "\n".join(lines)


def _adapter_line(outlook: Outlook) -> str:
    share = outlook.num_adapter / outlook.num_parameters
    return f"adapter               {outlook.num_adapter:,} trained, {share:.2%} of the model"


def as_json(outlook: Outlook, trial: Trial | None, world_size: int) -> str:
    """Return the estimates, and the mock step if there was one, as one JSON object."""
    memory = outlook.memory
    totals = {"device": memory.device, "host": memory.host}
    found: dict[str, Any] = {"world_size": world_size, **asdict(outlook)}
    found["memory"] |= totals
    found["mock_step"] = None if trial is None else asdict(trial)
    return json.dumps(found, indent=1)


def make_method(section: Any) -> Method:
    """Return the method of a recipe section."""
    method: Method = METHODS[section.kind](section)
    return method


def run(options: argparse.Namespace) -> None:
    """Run the command. Collective: every rank must call it."""
    recipe = read_recipe(options)
    if options.data:
        if launcher_rank() == 0:
            check_data(recipe, options.schedules)
        return
    if options.preemption:
        _check_preemption(recipe, options)
        return
    if not options.no_step:
        check_inputs(recipe)
    world_size = options.world_size or launcher_world_size()
    device = options.device or ("cuda" if options.no_step else _device_here())
    outlook, kept = look_ahead(recipe, world_size, make_method, device=device)
    speaks = launcher_rank() == 0
    if speaks and not options.json:
        print(dump_recipe(recipe))
        print(describe(outlook, world_size), flush=True)
    trial = None if options.no_step else _mock(recipe, kept)
    if speaks and options.json:
        print(as_json(outlook, trial, world_size), flush=True)
    elif speaks and trial is not None:
        hours = outlook.num_steps * trial.step_seconds / 3600
        print(
            f"mock step             loss {trial.loss:.4f}, {trial.step_seconds:.3f} s,"
            f" {outlook.target_tokens_per_step / trial.step_seconds:,.0f} target tokens/s,"
            f" peak {trial.memory_bytes / 1e9:.3f} GB; about {hours:.2f} h in all",
            flush=True,
        )


def _check_preemption(recipe: Recipe, options: argparse.Namespace) -> None:
    if launcher_world_size() > 1:
        raise ConfigError(
            "check --preemption starts its processes itself; start it alone, with --ranks N."
        )
    check_inputs(recipe)
    folder = recipe.run.output_dir.parent
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".forgetscale-preemption-", dir=folder) as scratch:
        changes = [
            *options.set,
            f"run.output_dir={scratch}/run",
            "train.num_target_tokens=null",
            "train.num_steps=4",
        ]
        arguments = ["train", "--config", str(options.config)]
        arguments += [word for change in changes for word in ("--set", change)]
        rehearse(forgetscale_command(arguments, options.ranks), options.notice, print)


def _device_here() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _mock(recipe: Recipe, kept: Protection) -> Trial:
    with tempfile.TemporaryDirectory(prefix="forgetscale-check-") as folder:
        with running_world(Path(folder)) as (world, _):
            return mock_steps(recipe, make_method(recipe.method), world, kept)

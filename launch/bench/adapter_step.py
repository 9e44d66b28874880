"""Step time and bytes of LoRA against full fine-tuning, and of what goes on with it.

ZeRO-3 engines of the same random OLMo 2 take turns on the same rows; each turn gives one ratio of
step times. Bytes of gradients and optimizer are measured and compared with the adapter's share of
the parameters; the largest relative difference is kept.

    python launch/bench/adapter_step.py
    python launch/bench/adapter_step.py --checkpointing --rank 64
    deepspeed --num_accelerators 2 launch/bench/adapter_step.py --dtype bfloat16
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from layout_step import SHAPES, WARMUP_STEPS, one_step, step_parser
from measure import keep, make_inputs, spread, training_recipe

from forgetscale.config import Recipe, recipe_dict, validate_recipe
from forgetscale.data import open_stream
from forgetscale.engine.adapters import find_adapters
from forgetscale.engine.protection import adapted
from forgetscale.engine.start import SourceModel, open_source, start_engine
from forgetscale.zero3 import World, ZeroEngine, start_world, stop_world

KINDS = ("masters", "moments", "gradients")


def start_engines(
    folder: Path, options: argparse.Namespace, world: World
) -> tuple[dict[str, ZeroEngine], Recipe, SourceModel]:
    """Make an engine for full fine-tuning and one for the adapter."""
    full = training_recipe(
        folder, "adapter-step", {"kind": "sft"}, options, options.global_batch_size
    )
    section = {"kind": options.adapter, "rank": options.rank, "alpha": 2 * options.rank}
    recipe = validate_recipe(recipe_dict(full) | {"adapter": section})
    source = open_source(full, world)
    kept = adapted(None, find_adapters(recipe, source.skeleton), source.shapes)
    engines = {
        "full": start_engine(full, world, source, plan=None, training=True),
        options.adapter: start_engine(
            recipe, world, source, plan=kept.plan, training=True, adapters=kept.adapters
        ),
    }
    for engine in engines.values():
        engine.set_training(True)
    return engines, recipe, source


def measure_steps(
    engines: dict[str, ZeroEngine], recipe: Recipe, options: argparse.Namespace, world: World
) -> dict[str, Any]:
    """Let the engines take turns; return seconds and ratios."""
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    stream = open_stream(
        recipe.data.path,
        seed=1,
        global_batch_size=options.global_batch_size,
        rank=world.rank,
        world_size=world.size,
    )
    for number in range(options.steps + WARMUP_STEPS):
        rows = next(stream).input_ids
        for name in list(engines) if number % 2 else list(engines)[::-1]:
            taken, _ = one_step(engines[name], recipe, rows, world)
            if number >= WARMUP_STEPS:
                seconds[name].append(taken)
    pairs = zip(seconds[options.adapter], seconds["full"], strict=True)
    return {
        "seconds": {name: spread(values) for name, values in seconds.items()},
        f"{options.adapter}/full": spread([a / b for a, b in pairs]),
    }


def measure_bytes(engines: dict[str, ZeroEngine], source: SourceModel) -> dict[str, Any]:
    """Return this rank's bytes, and gradients with optimizer against the adapter's share."""
    found: dict[str, Any] = {name: e.shards.state_bytes() for name, e in engines.items()}
    (name,) = set(engines) - {"full"}
    factors = engines[name].layout.factors()
    trained = sum(torch.Size(shape).numel() for shape in factors.values())
    total = sum(torch.Size(shape).numel() for shape in source.shapes.values())
    part, whole = (sum(found[n][kind] for kind in KINDS) for n in (name, "full"))
    return found | {
        "adapter_share": trained / total,
        f"{name}/full": part / whole,
        "relative_difference": abs(part / whole / (trained / total) - 1),
    }


def main() -> None:
    """Measure and keep the result."""
    parser = step_parser(__doc__)
    parser.add_argument("--adapter", default="lora", choices=["lora", "svd"])
    parser.add_argument("--rank", type=int, default=16)
    options = parser.parse_args()
    hidden, layers, vocab = SHAPES[options.shape]
    with tempfile.TemporaryDirectory() as scratch:
        world = start_world(Path(scratch) / "log.txt")
        folder = Path(world.broadcast(scratch))
        if world.is_main:
            make_inputs(
                folder,
                hidden=hidden,
                layers=options.layers or layers,
                vocab=vocab,
                dtype=options.dtype,
                rows=256,
                block=options.block,
            )
        world.barrier()
        engines, recipe, source = start_engines(folder, options, world)
        result = measure_steps(engines, recipe, options, world)
        result |= {"bytes": measure_bytes(engines, source), "ranks": world.size}
        if world.is_main:
            settings = {k: v for k, v in vars(options).items() if k != "local_rank"}
            settings["deepspeed"] = options.deepspeed.name
            name = f"adapter_step-{options.adapter}-{options.shape}-{options.dtype}"
            name += f"-{world.size}ranks" + ("-checkpointing" if options.checkpointing else "")
            keep(name, {"settings": settings, **result})
        world.barrier()
        stop_world()


if __name__ == "__main__":
    main()

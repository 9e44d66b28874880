"""Step time, losses and bytes of a freeze plan's two layouts against full fine-tuning.

ZeRO-3 engines of the same random OLMo 2 take turns on the same rows; each turn gives one ratio of
step times. Budgets: masked / full <= 1.02, compact / full <= 0.87 (<= 0.90 with activation
checkpointing), losses of compact and masked equal within 1e-5, bytes of gradients and optimizer
equal to the trainable share within 1 %.

    python launch/bench/layout_step.py
    python launch/bench/layout_step.py --checkpointing --dtype bfloat16
    deepspeed --num_accelerators 2 launch/bench/layout_step.py --steps 50
    python launch/bench/layout_step.py --shape 7b --layouts compact --block 4096
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from measure import keep, make_inputs, spread, training_recipe

from forgetscale.config import Recipe
from forgetscale.config.deepspeed import accumulation_steps
from forgetscale.data import open_stream
from forgetscale.engine.loop import accumulate
from forgetscale.engine.metrics import RunLog, memory_bytes
from forgetscale.engine.micro_batches import micro_batches
from forgetscale.engine.plans import make_plan
from forgetscale.engine.start import SourceModel, open_source, start_engine
from forgetscale.masks import FreezePlan
from forgetscale.methods import METHODS
from forgetscale.ops.losses import cross_entropy
from forgetscale.zero3 import World, ZeroEngine, start_world, stop_world

ROOT = Path(__file__).resolve().parents[2]
LAYOUTS = ("full", "masked", "compact")
WARMUP_STEPS = 2
SHAPES = {  # hidden, layers, vocabulary
    "small": (1024, 4, 4096),
    "1b": (2048, 16, 100_352),
    "7b": (4096, 32, 100_352),
    "13b": (5120, 40, 100_352),
}


def step_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options of benches that time steps of one of ``SHAPES``.

    Args:
        description: Docstring of the bench.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--shape", default="small", choices=sorted(SHAPES))
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--block", type=int, default=512)
    parser.add_argument("--micro-batch-size", type=int, default=2)
    parser.add_argument("--global-batch-size", type=int, default=2)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--accumulation-dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--deepspeed", type=Path, default=ROOT / "ds_configs" / "zero3.json")
    return parser


def make_recipe(folder: Path, options: argparse.Namespace, layout: str) -> Recipe:
    """Return an SSU recipe over random data below ``folder``."""
    calibration = {"path": str(folder / "tokens"), "num_blocks": 4}
    method = {"kind": "ssu", "score": options.score, "layout": layout}
    if options.score in ("paper", "official"):
        method["calibration"] = calibration
    batch_size = options.global_batch_size
    return training_recipe(folder, "layout-step", method, options, batch_size)


def one_step(
    engine: ZeroEngine, recipe: Recipe, rows: torch.Tensor, world: World
) -> tuple[float, float]:
    """Run one step as the training loop does; return its seconds and its loss."""
    start = time.perf_counter()
    count = accumulation_steps(recipe, world.size)
    batches = list(micro_batches(rows, recipe.train.micro_batch_size, count))
    num_targets = recipe.train.global_batch_size * (rows.shape[1] - 1)
    loss_sum = accumulate(engine, cross_entropy, batches, num_targets)
    assert engine.shards.non_finite() is None
    engine.shards.freeze(decay=recipe.optim.lr * recipe.optim.weight_decay)
    engine.step(recipe.optim.lr)
    if world.device.type == "cuda":
        torch.cuda.synchronize()
    world.barrier()
    seconds = time.perf_counter() - start
    return seconds, float(world.sum(loss_sum.double())) / num_targets


def start_engines(
    folder: Path, options: argparse.Namespace, world: World
) -> tuple[dict[str, ZeroEngine], Recipe, SourceModel, FreezePlan]:
    """Make one plan and one engine per layout."""
    recipe = make_recipe(folder, options, "compact")
    source = open_source(recipe, world)
    log = RunLog(folder / f"log-{world.rank}.txt", False)
    plan = make_plan(recipe, world, source, METHODS["ssu"](recipe.method), log)
    assert plan is not None
    engines = {}
    for layout in options.layouts:
        protected = None if layout == "full" else plan
        of_layout = make_recipe(folder, options, "masked" if layout == "masked" else "compact")
        engines[layout] = start_engine(of_layout, world, source, plan=protected, training=True)
        engines[layout].set_training(True)
    return engines, recipe, source, plan


def measure_steps(
    engines: dict[str, ZeroEngine], recipe: Recipe, options: argparse.Namespace, world: World
) -> dict[str, Any]:
    """Let the engines take turns; return seconds, ratios and losses."""
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    losses: dict[str, list[float]] = {name: [] for name in engines}
    stream = open_stream(
        recipe.data.path,
        seed=1,
        global_batch_size=options.global_batch_size,
        rank=world.rank,
        world_size=world.size,
    )
    for number in range(options.steps + WARMUP_STEPS):
        rows = next(stream).input_ids
        order = list(engines) if number % 2 else list(engines)[::-1]
        for name in order:
            taken, loss = one_step(engines[name], recipe, rows, world)
            losses[name].append(loss)
            if number >= WARMUP_STEPS:
                seconds[name].append(taken)
    tokens = options.global_batch_size * options.block
    found: dict[str, Any] = {
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "tokens_per_second": {
            name: tokens / spread(values)["median"] for name, values in seconds.items()
        },
    }
    for name in set(engines) - {"full"}:
        if "full" in engines:
            pairs = zip(seconds[name], seconds["full"], strict=True)
            found[f"{name}/full"] = spread([a / b for a, b in pairs])
    if {"masked", "compact"} <= set(engines):
        errors = [
            abs(a - b) / abs(b) for a, b in zip(losses["compact"], losses["masked"], strict=True)
        ]
        found["largest_relative_loss_difference"] = max(errors)
        found["loss"] = {name: [values[0], values[-1]] for name, values in losses.items()}
    return found


def measure_bytes(
    engines: dict[str, ZeroEngine], source: SourceModel, plan: FreezePlan
) -> dict[str, Any]:
    """Return bytes of this rank by engine, and the compact share against the trainable share."""
    found: dict[str, Any] = {name: e.shards.state_bytes() for name, e in engines.items()}
    if {"full", "compact"} <= set(engines):
        kinds = ("masters", "moments", "gradients")
        full, compact = (sum(found[n][k] for k in kinds) for n in ("full", "compact"))
        total = sum(torch.Size(shape).numel() for shape in source.shapes.values())
        vectors = sum(
            index.numel() for name, index in plan.columns.items() if len(source.shapes[name]) == 1
        )
        # Frozen elements of vectors stay under a mask; they are a ten-thousandth of the model.
        share = 1 - (plan.num_frozen(source.shapes) - vectors) / total
        found |= {"compact/full": compact / full, "trainable_share": share}
    return found


def main() -> None:
    """Measure and keep the result."""
    parser = step_parser(__doc__)
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=LAYOUTS)
    parser.add_argument("--score", default="paper", choices=["paper", "mag_l2", "rand"])
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
        engines, recipe, source, plan = start_engines(folder, options, world)
        result = measure_steps(engines, recipe, options, world)
        result |= {"bytes": measure_bytes(engines, source, plan), "ranks": world.size}
        result["peak_bytes"] = memory_bytes()
        if world.is_main:
            settings = {k: v for k, v in vars(options).items() if k != "local_rank"}
            settings["deepspeed"] = options.deepspeed.name
            name = f"layout_step-{options.shape}-{options.block}-{options.dtype}"
            name += f"-{world.size}ranks" + ("-checkpointing" if options.checkpointing else "")
            keep(name, {"settings": settings, **result})
        world.barrier()
        stop_world()


if __name__ == "__main__":
    main()

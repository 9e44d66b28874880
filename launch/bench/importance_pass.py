"""Time of a calibration pass that measures importance, against a plain forward pass.

The same batches of the same ZeRO-3 model run with and without observers, in turns; each turn gives
one ratio, on the clock and in CPU time (which other jobs on the machine disturb less). Budget of
the activation scores (``paper``, ``official``, ``sgpt_official`` come from one pass together):
median ratio <= 1.1. ``sgpt_true`` adds a matrix product per distinct input, ``fisher`` a backward
pass and the weight gradients; their ratios are given without a budget.

    python launch/bench/importance_pass.py
    deepspeed --num_accelerators 2 launch/bench/importance_pass.py --turns 10
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from measure import keep, make_model, make_tokens, spread

from forgetscale.api import Batch
from forgetscale.config import Recipe, validate_recipe
from forgetscale.engine.calibration import SourceCalibration
from forgetscale.engine.metrics import RunLog
from forgetscale.engine.run import calibration_for, open_source
from forgetscale.methods.ssu.gradients import GradientSquares, backward_batch
from forgetscale.methods.ssu.statistics import InputProducts, InputStatistics, Observer
from forgetscale.methods.ssu.targets import find_targets
from forgetscale.zero3 import World, start_world, stop_world

ROOT = Path(__file__).resolve().parents[2]
VOCAB = 4096
Arm = tuple[Callable[[], Sequence[Observer]], Callable[[Batch], None]]
"""How observers are made, and what runs a batch."""


def make_recipe(folder: Path, options: argparse.Namespace) -> Recipe:
    """Return an SSU recipe over random data below ``folder``."""
    calibration = {
        "path": str(folder / "tokens"),
        "num_blocks": options.blocks,
        "micro_batch_size": options.micro_batch_size,
    }
    return validate_recipe(
        {
            "run": {"name": "importance-pass", "output_dir": str(folder / "run")},
            "model": {"path": str(folder / "model"), "dtype": options.dtype},
            "data": {"path": str(folder / "tokens")},
            "method": {"kind": "ssu", "score": "paper", "calibration": calibration},
            "train": {"num_steps": 1},
            "deepspeed": str(ROOT / "ds_configs" / "zero3.json"),
        }
    )


def arms(calibration: SourceCalibration) -> dict[str, Arm]:
    """Return what is compared, the plain forward first."""
    targets = [t for t in find_targets(calibration.structure) if not t.is_bias]
    live = calibration.named_modules()
    modules = {t.module: live[t.module] for t in targets}
    matrices = {t.module: live[t.module] for t in targets if not t.is_vector}
    count = calibration.num_blocks
    run = calibration.forward
    return {
        "plain": (lambda: [], run),
        "activations": (lambda: [InputStatistics(modules, count)], run),
        "sgpt_true": (
            lambda: [InputProducts(matrices, 2**40), InputStatistics(modules, count)],
            run,
        ),
        "fisher": (
            lambda: [GradientSquares(live, targets)],
            partial(backward_batch, calibration, False),
        ),
    }


def one_pass(arm: Arm, batches: Sequence[Batch], world: World) -> tuple[float, float]:
    """Run all batches once; return the seconds, on the clock and of this process's CPU time."""
    make, run = arm
    observers = make()
    world.barrier()
    start, used = time.perf_counter(), time.process_time()
    for batch in batches:
        for observer in observers:
            observer.start(batch)
        run(batch)
    if world.device.type == "cuda":
        torch.cuda.synchronize()
    taken = (time.perf_counter() - start, time.process_time() - used)
    for observer in observers:
        observer.close()
    return taken


def main() -> None:
    """Measure and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--block", type=int, default=512)
    parser.add_argument("--micro-batch-size", type=int, default=1)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        log_path = Path(scratch) / "log.txt"
        world = start_world(log_path)
        folder = Path(world.broadcast(scratch))
        if world.is_main:
            size = {"hidden": options.hidden, "layers": options.layers, "vocab": VOCAB}
            make_model(folder / "model", **size, dtype=options.dtype)
            rows = options.blocks
            make_tokens(
                folder / "tokens", folder / "model", rows=rows, block=options.block, vocab=VOCAB
            )
        world.barrier()
        recipe = make_recipe(folder, options)
        source = open_source(recipe, world)
        calibration = calibration_for(recipe, world, source, RunLog(log_path, False))
        compared = arms(calibration)
        batches = list(calibration.batches())
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in compared}
        for number in range(options.turns + 1):
            order = list(compared) if number % 2 else list(compared)[::-1]
            for name in order:
                taken = one_pass(compared[name], batches, world)
                if number:
                    seconds[name].append(taken)
        calibration.close()
        if world.is_main:
            settings = {k: v for k, v in vars(options).items() if k != "local_rank"}
            result = {}
            for clock, unit in enumerate(("seconds", "cpu_seconds")):
                plain = [taken[clock] for taken in seconds["plain"]]
                for name, found in seconds.items():
                    values = [taken[clock] for taken in found]
                    ratios = [a / b for a, b in zip(values, plain, strict=True)]
                    result[f"{name}_{unit}"] = spread(values)
                    result[f"{name}_{unit}_ratio"] = spread(ratios)
            result |= {"budget_of_activations": 1.1, "ranks": world.size}
            keep(f"importance_pass-{options.dtype}-{world.size}ranks", {**settings, **result})
        world.barrier()
        stop_world()


if __name__ == "__main__":
    main()

"""Step time of the masked layout against the same run without a plan, in one process group.

Two ZeRO-3 engines of the same random OLMo 2 take turns on the same rows; each pair of steps gives
one ratio. Budget: median ratio <= 1.02.

    python launch/bench/masked_step.py
    deepspeed --num_accelerators 2 launch/bench/masked_step.py --steps 30
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from measure import keep, make_model, make_tokens, spread

from forgetscale.config import Recipe, validate_recipe
from forgetscale.config.deepspeed import accumulation_steps
from forgetscale.data import open_stream
from forgetscale.engine.loop import accumulate, micro_batches
from forgetscale.engine.metrics import RunLog
from forgetscale.engine.run import make_plan, open_source, start_engine
from forgetscale.methods import METHODS
from forgetscale.ops.losses import cross_entropy
from forgetscale.zero3 import World, ZeroEngine, start_world, stop_world

ROOT = Path(__file__).resolve().parents[2]
VOCAB = 4096


def make_recipe(folder: Path, options: argparse.Namespace) -> Recipe:
    """Return an SSU recipe over random data below ``folder``."""
    calibration = {"path": str(folder / "tokens"), "num_blocks": 4}
    return validate_recipe(
        {
            "run": {"name": "masked-step", "output_dir": str(folder / "run")},
            "model": {"path": str(folder / "model"), "dtype": options.dtype},
            "data": {"path": str(folder / "tokens")},
            "method": {"kind": "ssu", "score": "paper", "calibration": calibration},
            "train": {
                "num_steps": options.steps,
                "micro_batch_size": options.micro_batch_size,
                "global_batch_size": options.global_batch_size,
            },
            "deepspeed": str(ROOT / "ds_configs" / "zero3.json"),
        }
    )


def one_step(engine: ZeroEngine, recipe: Recipe, rows: torch.Tensor, world: World) -> float:
    """Run one step as the training loop does; return its seconds."""
    start = time.perf_counter()
    count = accumulation_steps(recipe, world.size)
    batches = list(micro_batches(rows, recipe.train.micro_batch_size, count))
    num_targets = recipe.train.global_batch_size * (rows.shape[1] - 1)
    accumulate(engine, cross_entropy, batches, num_targets)
    assert engine.shards.non_finite() is None
    engine.shards.freeze(decay=1e-6)
    engine.step(1e-5)
    if world.device.type == "cuda":
        torch.cuda.synchronize()
    world.barrier()
    return time.perf_counter() - start


def main() -> None:
    """Measure and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--block", type=int, default=256)
    parser.add_argument("--micro-batch-size", type=int, default=2)
    parser.add_argument("--global-batch-size", type=int, default=4)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        log_path = Path(scratch) / "log.txt"
        world = start_world(log_path)
        folder = Path(world.broadcast(scratch))
        if world.is_main:
            make_model(
                folder / "model",
                hidden=options.hidden,
                layers=options.layers,
                vocab=VOCAB,
                dtype=options.dtype,
            )
            make_tokens(
                folder / "tokens", folder / "model", rows=256, block=options.block, vocab=VOCAB
            )
        world.barrier()
        recipe = make_recipe(folder, options)
        source = open_source(recipe, world)
        log = RunLog(log_path, False)
        plan = make_plan(recipe, world, source, METHODS["ssu"](recipe.method), log)
        engines = {
            "masked": start_engine(recipe, world, source, plan=plan, training=True),
            "without_plan": start_engine(recipe, world, source, plan=None, training=True),
        }
        seconds: dict[str, list[float]] = {name: [] for name in engines}
        stream = open_stream(
            recipe.data.path,
            seed=1,
            global_batch_size=options.global_batch_size,
            rank=world.rank,
            world_size=world.size,
        )
        for number in range(options.steps + 2):
            rows = next(stream).input_ids
            order = list(engines) if number % 2 else list(engines)[::-1]
            for name in order:
                engines[name].set_training(True)
                taken = one_step(engines[name], recipe, rows, world)
                if number >= 2:
                    seconds[name].append(taken)
        ratios = [a / b for a, b in zip(seconds["masked"], seconds["without_plan"], strict=True)]
        if world.is_main:
            settings = {k: v for k, v in vars(options).items() if k != "local_rank"}
            result = {name: spread(values) for name, values in seconds.items()}
            result |= {"ratio": spread(ratios), "budget": 1.02, "ranks": world.size}
            keep(f"masked_step-{options.dtype}-{world.size}ranks", {"settings": settings, **result})
        world.barrier()
        stop_world()


if __name__ == "__main__":
    main()

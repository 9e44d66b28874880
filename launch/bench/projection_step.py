"""Step time of full-rank projection and of AlignGuard-LoRA against the same step without them.

ZeRO-3 engines of the same random OLMo 2 take turns on the same rows; each turn gives one ratio of
step times. Budgets at width >= 1024 and 32 directions: projection / full <= 1.15, AlignGuard-LoRA /
LoRA <= 1.10. The bytes a step sums over ranks for the protection are counted where they are sent
and compared with the formula (left: m x in numbers a matrix and one norm).

    python launch/bench/projection_step.py
    python launch/bench/projection_step.py --reading right --steps 10
    deepspeed --num_accelerators 2 launch/bench/projection_step.py --steps 10
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from measure import keep, make_inputs, spread, training_recipe
from torch import Tensor

from forgetscale.api import Method
from forgetscale.config import Recipe, recipe_dict, validate_recipe
from forgetscale.config.deepspeed import accumulation_steps
from forgetscale.data import open_stream
from forgetscale.engine.loop import accumulate
from forgetscale.engine.metrics import RunLog
from forgetscale.engine.micro_batches import micro_batches
from forgetscale.engine.protection import settle_protection
from forgetscale.engine.start import open_source, start_engine
from forgetscale.methods import METHODS
from forgetscale.ops.losses import cross_entropy
from forgetscale.projections.basis import FisherBasis
from forgetscale.zero3 import World, ZeroEngine, start_world, stop_world

ROOT = Path(__file__).resolve().parents[2]
WARMUP_STEPS = 1
ADAPTER = {"kind": "lora", "rank": 8, "alpha": 16}


class Counter:
    """Bytes that go through ``all_reduce_sum`` of an engine's slices."""

    def __init__(self, engine: ZeroEngine) -> None:
        self.bytes = 0
        original = engine.shards.all_reduce_sum

        def counted(value: Tensor) -> Tensor:
            self.bytes += value.numel() * value.element_size()
            return original(value)

        engine.shards.all_reduce_sum = counted  # type: ignore[method-assign]


def recipe_of(folder: Path, options: argparse.Namespace, name: str) -> Recipe:
    """Return the recipe of ``full``, ``projected``, ``lora`` or ``alignguard_lora``."""
    method: dict[str, Any] = {"kind": "sft"}
    if name in ("projected", "alignguard_lora"):
        kind = "alignguard" if name == "projected" else name
        calibration = {"path": str(folder / "tokens"), "num_blocks": 2}
        fisher = {"max_rank": options.rank, "explained": 1.0}
        method = {"kind": kind, "reading": options.reading, "calibration": calibration}
        method["fisher"] = fisher
    base = training_recipe(folder, name, {"kind": "sft"}, options, options.global_batch_size)
    found = recipe_dict(base) | {"method": method}
    found["run"]["output_dir"] = str(folder / "runs" / "with-basis" / name)
    if name in ("lora", "alignguard_lora"):
        found["adapter"] = ADAPTER
    return validate_recipe(found)


def one_step(
    engine: ZeroEngine, method: Method, recipe: Recipe, rows: Tensor, world: World, step: int
) -> float:
    """Run one step as the training loop does; return its seconds."""
    start = time.perf_counter()
    count = accumulation_steps(recipe, world.size)
    batches = list(micro_batches(rows, recipe.train.micro_batch_size, count))
    num_targets = recipe.train.global_batch_size * (rows.shape[1] - 1)
    accumulate(engine, cross_entropy, batches, num_targets)
    shards = engine.shards
    shards.lr = recipe.optim.lr
    if recipe.method.kind != "sft":
        method.transform_gradients(shards, step)
        shards.write_gradients()
    assert shards.non_finite() is None
    shards.freeze(decay=recipe.optim.lr * recipe.optim.weight_decay)
    engine.step(recipe.optim.lr)
    if recipe.method.kind != "sft":
        method.after_step(shards, step)
        shards.write_params()
    if world.device.type == "cuda":
        torch.cuda.synchronize()
    world.barrier()
    return time.perf_counter() - start


def formula_bytes(basis: FisherBasis, reading: str, shapes: dict[str, tuple[int, ...]]) -> int:
    """Return the bytes a step of full-rank projection sums over ranks, by the note's formula.

    Only for readings whose cost does not depend on how rows are cut.
    """
    total = 0
    for name in basis.names("left" if reading == "left" else "vector"):
        m = basis.values("left" if reading == "left" else "vector", name).numel()
        total += m * (shapes[name][1] if reading == "left" else 1) + 1
    return 4 * total


def measure(
    names: list[str], folder: Path, options: argparse.Namespace, world: World
) -> dict[str, Any]:
    """Let the engines take turns."""
    made: dict[str, tuple[ZeroEngine, Method, Recipe, Counter]] = {}
    log = RunLog(folder / f"log-{world.rank}.txt", False)
    shapes: dict[str, tuple[int, ...]] = {}
    for name in names:
        recipe = recipe_of(folder, options, name)
        source = open_source(recipe, world)
        shapes = source.shapes
        method = METHODS[recipe.method.kind](recipe.method)
        kept = settle_protection(recipe, world, source, method, log)
        engine = start_engine(
            recipe, world, source, plan=kept.plan, training=True, adapters=kept.adapters
        )
        engine.set_training(True)
        made[name] = engine, method, recipe, Counter(engine)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    sent: dict[str, int] = {}
    recipe = made[names[0]][2]
    stream = open_stream(
        recipe.data.path,
        seed=1,
        global_batch_size=options.global_batch_size,
        rank=world.rank,
        world_size=world.size,
    )
    for number in range(options.steps + WARMUP_STEPS):
        rows = next(stream).input_ids
        for name in names if number % 2 else names[::-1]:
            engine, method, recipe, counter = made[name]
            before = counter.bytes
            taken = one_step(engine, method, recipe, rows, world, number + 1)
            sent[name] = counter.bytes - before
            if number >= WARMUP_STEPS:
                seconds[name].append(taken)
    result: dict[str, Any] = {name: spread(values) for name, values in seconds.items()}
    plain, held = names
    pairs = zip(seconds[held], seconds[plain], strict=True)
    result[f"{held}/{plain}"] = spread([a / b for a, b in pairs])
    result["bytes_per_step"] = {"sent": sent[held]}
    if held == "projected" and options.reading in ("left", "vector"):
        basis = FisherBasis(folder / "runs" / "with-basis" / "projected" / "fisher")
        expected = formula_bytes(basis, options.reading, shapes)
        assert sent[held] == expected, (sent[held], expected)
        result["bytes_per_step"]["formula"] = expected
    for engine, *_ in made.values():
        engine.destroy()
    return result


def main() -> None:
    """Measure and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--block", type=int, default=512)
    parser.add_argument("--rank", type=int, default=32, help="directions of a matrix")
    parser.add_argument("--reading", default="left", choices=["left", "right", "vector"])
    parser.add_argument("--micro-batch-size", type=int, default=2)
    parser.add_argument("--global-batch-size", type=int, default=2)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--accumulation-dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--skip", default="", choices=["", "full", "lora"], help="leave a pair out")
    parser.add_argument("--deepspeed", type=Path, default=ROOT / "ds_configs" / "zero3.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        world = start_world(Path(scratch) / "log.txt")
        folder = Path(world.broadcast(scratch))
        if world.is_main:
            make_inputs(
                folder,
                hidden=options.hidden,
                layers=options.layers,
                vocab=options.vocab,
                dtype=options.dtype,
                rows=64,
                block=options.block,
            )
        world.barrier()
        result: dict[str, Any] = {"ranks": world.size}
        for plain, held in (("full", "projected"), ("lora", "alignguard_lora")):
            if plain != options.skip:
                result[held] = measure([plain, held], folder, options, world)
        if world.is_main:
            settings = {k: v for k, v in vars(options).items() if k != "local_rank"}
            settings["deepspeed"] = options.deepspeed.name
            name = f"projection_step-{options.hidden}-{options.reading}-{options.dtype}"
            name += f"-{world.size}ranks" + (f"-no-{options.skip}" if options.skip else "")
            keep(name, {"settings": settings, **result})
        world.barrier()
        stop_world()


if __name__ == "__main__":
    main()

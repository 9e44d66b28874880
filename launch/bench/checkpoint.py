"""How long training stands still for a checkpoint: ours beside training, ours waiting, DeepSpeed's.

One ZeRO-3 engine trains a random OLMo 2; the three ways to save take turns, a step before each.
Ours flushes every file, reads it back and hashes it; DeepSpeed's default ``save_checkpoint`` does
none of that and writes frozen weights and the model in its own type as well.

    python launch/bench/checkpoint.py
    deepspeed --num_accelerators 2 launch/bench/checkpoint.py --hidden 1024 --layers 4
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from layout_step import one_step
from measure import keep, make_inputs, spread, training_recipe

from forgetscale.checkpoint import CheckpointStore, RunState
from forgetscale.config import Recipe, recipe_dict
from forgetscale.data import TokenStream, open_stream
from forgetscale.engine.start import open_source, start_engine
from forgetscale.zero3 import World, ZeroEngine, start_world, stop_world

ROOT = Path(__file__).resolve().parents[2]
WAYS = ("async", "sync", "deepspeed")
MOST_STEPS = 1000


def open_store(folder: Path, recipe: Recipe, world: World, way: str) -> CheckpointStore:
    """Return a store of ours that saves in one of its two modes."""
    return CheckpointStore(
        folder / way,
        world,
        keep=2,
        recipe=recipe_dict(recipe),
        log=lambda line: None,
        background=way == "async",
    )


def save_ours(
    store: CheckpointStore,
    engine: ZeroEngine,
    recipe: Recipe,
    stream: TokenStream,
    number: int,
    world: World,
) -> dict[str, Any]:
    """Save, and train on until it is published."""
    state = RunState(number, 0, 0, world.size, "data", None, "model")
    store.save(state, engine, {})
    steps: list[float] = []
    while not (reports := store.take_reports()):
        assert len(steps) < MOST_STEPS, "the checkpoint was never published"
        steps.append(one_step(engine, recipe, next(stream).input_ids, world)[0])
        store.advance()
    report = reports[0]
    return {
        "stall": report.stall_seconds,
        "total": report.total_seconds,
        "steps": steps,
        "bytes": report.num_bytes,
    }


def save_deepspeed(engine: ZeroEngine, folder: Path, world: World) -> dict[str, Any]:
    """Save by DeepSpeed's own call; training waits for all of it."""
    world.barrier()
    begun = time.perf_counter()
    engine._engine.save_checkpoint(str(folder), tag="now")
    world.barrier()
    seconds = time.perf_counter() - begun
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return {"stall": seconds, "total": seconds, "steps": [], "bytes": sum(sizes)}


def measure(folder: Path, options: argparse.Namespace, world: World) -> dict[str, Any]:
    """Let the three ways take turns."""
    recipe = training_recipe(
        folder, "checkpoint", {"kind": "sft"}, options, options.global_batch_size
    )
    engine = start_engine(recipe, world, open_source(recipe, world), plan=None, training=True)
    engine.set_training(True)
    stream = open_stream(
        recipe.data.path,
        seed=1,
        global_batch_size=options.global_batch_size,
        rank=world.rank,
        world_size=world.size,
    )
    stores = {way: open_store(folder, recipe, world, way) for way in WAYS[:2]}
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    alone = []
    for turn in range(options.turns + 1):
        for way in WAYS if turn % 2 else WAYS[::-1]:
            alone.append(one_step(engine, recipe, next(stream).input_ids, world)[0])
            if way == "deepspeed":
                one = save_deepspeed(engine, folder / way, world)
            else:
                one = save_ours(stores[way], engine, recipe, stream, turn + 1, world)
                stores[way].advance(wait=True)
            if turn > 0:  # the first turn makes the room for copies and warms up
                found[way].append(one)
            world.barrier()
            if way == "deepspeed" and world.is_main:
                shutil.rmtree(folder / way)
            world.barrier()
    beside = [second for one in found["async"] for second in one["steps"]]
    result: dict[str, Any] = {
        way: {
            "stall_seconds": spread([one["stall"] for one in ones]),
            "total_seconds": spread([one["total"] for one in ones]),
            "gigabytes": ones[0]["bytes"] / 1e9,
        }
        for way, ones in found.items()
    }
    theirs = [one["stall"] for one in found["deepspeed"]]
    for way in WAYS[:2]:
        for what in ("stall", "total"):
            pairs = zip(found[way], theirs, strict=True)
            result[f"{what} of {way} / deepspeed"] = spread([one[what] / d for one, d in pairs])
    result["step_seconds"] = {"alone": spread(alone), "while writing": spread(beside or [0.0])}
    engine.destroy()
    return result


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--global-batch-size", type=int, default=4)
    parser.add_argument("--micro-batch-size", type=int, default=2)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    parser.add_argument("--deepspeed", type=Path, default=ROOT / "ds_configs" / "zero3.json")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.checkpointing, options.steps = False, MOST_STEPS
    options.accumulation_dtype = "float32"
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        world = start_world(Path(scratch) / "log.txt")
        folder = Path(world.broadcast(scratch))
        torch.manual_seed(0)
        if world.is_main:
            make_inputs(
                folder,
                hidden=options.hidden,
                layers=options.layers,
                vocab=options.vocab,
                dtype=options.dtype,
                rows=256,
                block=options.block,
            )
        world.barrier()
        result = measure(folder, options, world)
        if world.is_main:
            settings = {k: v for k, v in vars(options).items() if k not in ("local_rank", "folder")}
            settings["deepspeed"] = options.deepspeed.name
            name = f"checkpoint-{options.hidden}x{options.layers}-{world.size}ranks"
            keep(name, {"settings": settings, "ranks": world.size, **result})
        world.barrier()
        stop_world()


if __name__ == "__main__":
    main()

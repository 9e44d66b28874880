"""Peak memory of training against what ``forgetscale check`` predicts.

Each layout, with and without activation checkpointing, runs a few steps in a process of its own;
the prediction is made from configuration files before. Budget: within 10 %.

On a GPU the peak is ``max_memory_allocated``. On a CPU it is exact too: the tensors that live when
the engine stands are counted by storage, and from then on the allocator reports every allocation
and release to torch's profiler. (Before, gloo's threads release memory unseen by the profiler.
Resident memory is kept beside it; it holds libraries, kernel scratch space and freed pages.)

    python launch/bench/memory_model.py
    python launch/bench/memory_model.py --dtype bfloat16 --accumulation-dtype bfloat16
    python launch/bench/memory_model.py --ranks 2                     rank 0 is measured
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from measure import keep, make_model, make_tokens, training_recipe

from forgetscale.config import Recipe
from forgetscale.config.deepspeed import accumulation_steps
from forgetscale.data import open_stream
from forgetscale.engine.dry_run import look_ahead
from forgetscale.engine.loop import accumulate
from forgetscale.engine.metrics import RunLog
from forgetscale.engine.micro_batches import micro_batches
from forgetscale.engine.plans import make_plan, write_plan
from forgetscale.engine.start import open_source, start_engine
from forgetscale.masks import load_plan
from forgetscale.methods import METHODS
from forgetscale.ops.losses import cross_entropy
from forgetscale.zero3 import World, ZeroEngine, start_world, stop_world

ROOT = Path(__file__).resolve().parents[2]
LAYOUTS = ("full", "masked", "compact")
LIMIT = 0.10


def make_recipe(folder: Path, options: argparse.Namespace) -> Recipe:
    """Return the recipe of one case; the model and its data lie below ``folder``."""
    method: dict[str, Any] = {"kind": "sft"}
    if options.layout != "full":
        calibration = {"path": str(folder / "tokens"), "num_blocks": 2}
        method = {"kind": "ssu", "layout": options.layout, "calibration": calibration}
    batch_size = options.micro_batch_size * options.ranks
    return training_recipe(folder, "memory-model", method, options, batch_size)


def live_bytes() -> int:
    """Return the bytes of all tensors of this process that have memory, each storage once."""
    gc.collect()
    found: dict[int, int] = {}
    for item in gc.get_objects():
        if isinstance(item, torch.Tensor) and item.device.type == "cpu":
            storage = item.untyped_storage()
            found[storage._cdata] = storage.nbytes()
    return sum(found.values())


@contextmanager
def measured_peak() -> Iterator[dict[str, int]]:
    """Fill in the largest number of bytes that tensors hold at one time inside the block."""
    found: dict[str, int] = {}
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        yield found
        found["peak"] = torch.cuda.max_memory_allocated()
        return
    before = live_bytes()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        yield found
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    live = peak = before
    for _, change in changes:
        live += change
        peak = max(peak, live)
    found["peak"] = peak


def run_steps(engine: ZeroEngine, recipe: Recipe, world: World) -> None:
    """Run steps as the training loop does."""
    stream = open_stream(
        recipe.data.path,
        seed=1,
        global_batch_size=recipe.train.global_batch_size,
        rank=world.rank,
        world_size=world.size,
    )
    engine.set_training(True)
    count = accumulation_steps(recipe, world.size)
    for _ in range(recipe.train.num_steps or 0):
        rows = next(stream).input_ids
        batches = list(micro_batches(rows, recipe.train.micro_batch_size, count))
        targets = recipe.train.global_batch_size * (rows.shape[1] - 1)
        accumulate(engine, cross_entropy, batches, targets)
        assert engine.shards.non_finite() is None
        engine.shards.freeze(decay=recipe.optim.lr * recipe.optim.weight_decay)
        engine.step(recipe.optim.lr)


def run_case(folder: Path, options: argparse.Namespace) -> None:
    """Train for a few steps in this process and write what was measured."""
    world = start_world(folder / f"log-{os.environ.get('RANK', '0')}.txt")
    recipe = make_recipe(folder, options)
    source = open_source(recipe, world)
    plan = None if options.layout == "full" else load_plan(folder / "plan")
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    engine = start_engine(recipe, world, source, plan=plan, training=True)
    with measured_peak() as found:
        run_steps(engine, recipe, world)
        found |= engine.shards.state_bytes()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident
    if world.is_main:
        result = {**found, "resident_growth": 1024 * grown}
        (folder / "measured.json").write_text(json.dumps(result), encoding="utf-8")
    stop_world()


def plan_case(folder: Path, options: argparse.Namespace) -> None:
    """Make the freeze plan, so that no calibration lies in the measured processes."""
    world = start_world(folder / "log.txt")
    recipe = make_recipe(folder, options)
    log = RunLog(folder / "log.txt", False)
    plan = make_plan(recipe, world, open_source(recipe, world), METHODS["ssu"](recipe.method), log)
    assert plan is not None
    write_plan(folder / "plan", plan, recipe, world)
    stop_world()


def launch(folder: Path, options: argparse.Namespace, stage: str, ranks: int) -> None:
    """Start one case in fresh processes and wait."""
    settings = {k: v for k, v in vars(options).items() if k != "stage"}
    settings |= {"deepspeed": str(options.deepspeed)}
    command = [sys.executable, __file__, "--stage", stage, "--case", json.dumps(settings)]
    base = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": options.port}
    started = []
    for rank in range(ranks):
        env = os.environ | base | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        started.append(subprocess.Popen([*command, "--folder", str(folder)], env=env, cwd=ROOT))
    if any(process.wait() for process in started):
        raise SystemExit(f"{stage} of {settings} failed; see above.")


def compare(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Predict one case, run it, and return both."""
    recipe = make_recipe(folder, options)
    on_cpu = not torch.cuda.is_available()
    device = "cpu" if on_cpu else "cuda"
    outlook, _ = look_ahead(recipe, options.ranks, lambda c: METHODS[c.kind](c), device=device)
    launch(folder, options, "run", options.ranks)
    measured = json.loads((folder / "measured.json").read_text(encoding="utf-8"))
    memory = outlook.memory
    # The measured process saves nothing, so there are no copies for checkpoints.
    predicted = memory.device + (memory.host - memory.copies if on_cpu else 0)
    state = memory.state.measured_parts()
    assert state == {name: measured[name] for name in state}, (state, measured)
    parts = {k: v for k, v in asdict(memory).items() if k != "state"}
    return {
        "predicted": predicted,
        "measured": measured["peak"],
        "predicted/measured": predicted / measured["peak"],
        "lasting_state": state,
        "parts": parts,
        "resident_growth": measured["resident_growth"],
    }


def main() -> None:
    """Compare all cases and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stage", choices=["run", "plan"], help=argparse.SUPPRESS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=LAYOUTS)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--block", type=int, default=512)
    parser.add_argument("--micro-batch-size", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--port", default="29571")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--accumulation-dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--deepspeed", type=Path, default=ROOT / "ds_configs" / "zero3.json")
    options = parser.parse_args()
    if options.stage:
        case = argparse.Namespace(**json.loads(options.case))
        {"run": run_case, "plan": plan_case}[options.stage](options.folder, case)
        return
    options.layout, options.checkpointing = "masked", False
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        sizes = {"hidden": options.hidden, "layers": options.layers, "vocab": options.vocab}
        make_model(folder / "model", **sizes, dtype=options.dtype)
        tokens = {"rows": 64, "block": options.block, "vocab": options.vocab}
        make_tokens(folder / "tokens", folder / "model", **tokens)
        launch(folder, options, "plan", 1)
        for checkpointing in (False, True):
            for layout in options.layouts:
                options.layout, options.checkpointing = layout, checkpointing
                name = layout + ("-checkpointing" if checkpointing else "")
                found[name] = case = compare(folder, options)
                print(
                    f"{name:24s} predicted {case['predicted'] / 1e6:9.1f} MB, measured"
                    f" {case['measured'] / 1e6:9.1f} MB, ratio {case['predicted/measured']:.4f}",
                    flush=True,
                )
    hidden = ("stage", "case", "folder", "layout", "checkpointing", "port", "layouts")
    settings = {k: v for k, v in vars(options).items() if k not in hidden}
    settings["deepspeed"] = options.deepspeed.name
    worst = max(abs(case["predicted/measured"] - 1) for case in found.values())
    name = f"memory_model-{options.hidden}x{options.layers}-{options.dtype}-{options.ranks}ranks"
    if options.deepspeed.stem != "zero3":
        name += f"-{options.deepspeed.stem}"
    keep(name, {"settings": settings, "cases": found, "largest_error": worst})
    if worst > LIMIT:
        raise SystemExit(f"the largest error is {worst:.1%}, more than {LIMIT:.0%}")


if __name__ == "__main__":
    main()

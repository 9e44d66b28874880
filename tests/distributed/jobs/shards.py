"""Jobs at the level of slices: what DeepSpeed holds, and what our handling makes of it."""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

import forgetscale.engine.loop as loop
import forgetscale.zero3.engine as zero_engine
from forgetscale.config import OptimConfig, validate_recipe
from forgetscale.config.deepspeed import engine_config
from forgetscale.engine.start import open_source, start_engine
from forgetscale.errors import ForgetScaleError, NonFiniteError
from forgetscale.masks import CompactLayout, FreezePlan
from forgetscale.ops.losses import cross_entropy
from forgetscale.zero3 import (
    DTYPES,
    World,
    ZeroEngine,
    ZeroShards,
    build_engine,
    construct_partitioned,
    start_world,
)
from tests.distributed.jobs.training import command


def world() -> World:
    """Return the process group the server made."""
    return start_world(Path(tempfile.mkdtemp()) / "log.txt")


PARTS = ("first", "second", "third")


class Parts(nn.Module):
    """Matrices of which a forward pass may use only one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 7, bias=False)
        self.second = nn.Linear(5, 7, bias=False)
        # One element: on two ranks the second owns nothing but padding.
        self.third = nn.Linear(1, 1, bias=False)

    def forward(self, x: Tensor, parts: str) -> Tensor:
        modules = [getattr(self, part) for part in parts.split()]
        return sum(module(x[:, : module.in_features]).square().sum() for module in modules)


@contextlib.contextmanager
def parts_engine(
    dtype: str, config_path: str, frozen: bool = False, **changes: Any
) -> Iterator[tuple[ZeroEngine, World, dict[str, Tensor]]]:
    """Build an engine on ``Parts`` with known weights."""
    here = world()
    recipe = tiny_recipe(dtype, config_path, **changes)
    config = engine_config(recipe, here.size)
    model = construct_partitioned(Parts, config, DTYPES[dtype])
    generator = torch.Generator().manual_seed(1)
    weights = {n: torch.randn(7, 5, generator=generator) for n in ("first", "second")}
    weights["third"] = torch.tensor([[0.75]])

    def read(name: str, start: int, length: int, kind: torch.dtype) -> Tensor:
        return weights[name.split(".")[0]].flatten()[start : start + length].to(kind)

    plan = FreezePlan(columns={"first.weight": torch.tensor([1, 3])}) if frozen else None
    engine = build_engine(
        model,
        prefix="",
        read=read,
        world=here,
        config=config,
        layout=plan and CompactLayout({}, plan),
        optim=OptimConfig(lr=0.1, weight_decay=0.0, max_grad_norm=1e9),
    )
    yield engine, here, weights


def tiny_recipe(dtype: str, config_path: str, **changes: Any) -> Any:
    """Return a recipe that only serves to make an engine configuration."""
    train = {"num_steps": 1, "micro_batch_size": 1, "global_batch_size": dist.get_world_size()}
    return validate_recipe(
        {
            "run": {"name": "x", "output_dir": "x"},
            "model": {"path": "x", "dtype": dtype},
            "data": {"path": "x"},
            "method": {"kind": "sft"},
            "optim": {"max_grad_norm": 1e9},
            "train": train | changes,
            "deepspeed": config_path,
        }
    )


# ---- stale gradients --------------------------------------------------------------------


def stale_gradients(
    dtypes: list[str], config_path: str, schedule: list[list[str]]
) -> dict[str, dict[str, Any]]:
    """Take steps whose micro-batches use some of the parameters.

    Args:
        dtypes: Working types, an engine of each.
        config_path: DeepSpeed JSON.
        schedule: Per step a list of micro-batches, each the parts it uses.

    Returns:
        By type: norm of each step and whole masters after it.
    """
    made: dict[str, dict[str, Any]] = {}
    micro = len(schedule[0])
    rows = micro * dist.get_world_size()
    for dtype in dtypes:
        found: dict[str, Any] = {"norms": [], "masters": []}
        with parts_engine(dtype, config_path, global_batch_size=rows) as (engine, _, _):
            for step in schedule:
                for number, parts in enumerate(step):
                    x = torch.full((1, 5), 0.5 + 0.25 * number, dtype=DTYPES[dtype])
                    engine.backward(engine(x, parts), last=number == micro - 1)
                engine.shards.freeze(0.0)
                found["norms"].append(engine.step(0.1))
                found["masters"].append(engine.shards.gather([f"{part}.weight" for part in PARTS]))
            engine.destroy()
        made[dtype] = found
    return made


# ---- gradients --------------------------------------------------------------------------


def edit_gradients(dtype: str, config_path: str, accumulation: str) -> dict[str, Any]:
    """Halve one gradient and zero the other through ``ShardSet``; return what DeepSpeed sees."""
    with parts_engine(dtype, config_path, accumulation_dtype=accumulation) as (engine, here, _):
        x = torch.full((1, 5), 0.5, dtype=DTYPES[dtype])
        engine.backward(engine(x, "first second third"), last=True)
        before = {s.name: s.grad.clone() for s in engine.shards}
        for shard in engine.shards:
            shard.grad.mul_({"first": 0.0, "second": 0.5, "third": 2.0}[shard.name.split(".")[0]])
        engine.shards.write_gradients()
        after = {
            item.name: engine.shards.gradient(item).float().clone() for item in engine.shards.slices
        }
        expected = float(sum(here.sum(g.square().sum()) for g in after.values())) ** 0.5
        engine.shards.freeze(0.0)
        buffer = engine._engine.optimizer.grad_partitions_flat_buffer
        return {
            "before": before,
            "after": after,
            "dtype": str(buffer.dtype),
            "norm": engine.step(0.1),
            "expected_norm": expected,
            "decays": [g["weight_decay"] for g in engine._engine.optimizer.optimizer.param_groups],
        }


def masked_norm(dtype: str, config_path: str) -> dict[str, float]:
    """Return the norm DeepSpeed clips by and the one over what may move."""
    with parts_engine(dtype, config_path, frozen=True) as (engine, here, _):
        x = torch.full((1, 5), 0.5, dtype=DTYPES[dtype])
        engine.backward(engine(x, "first second third"), last=True)
        whole = math.sqrt(sum(float(here.sum(s.grad.square().sum())) for s in engine.shards))
        engine.shards.freeze(0.0)
        moving = math.sqrt(sum(float(here.sum(s.grad.square().sum())) for s in engine.shards))
        return {"whole": whole, "moving": moving, "clipped_by": engine.step(0.1)}


def many_small_gradients(config_path: str, accumulation: str, count: int) -> dict[str, Tensor]:
    """Sum one large and many small micro-batch gradients."""
    rows = count * dist.get_world_size()
    with parts_engine(
        "bfloat16", config_path, accumulation_dtype=accumulation, global_batch_size=rows
    ) as (engine, _, _):
        for number in range(count):
            x = torch.full((1, 5), 8.0 if number == 0 else 0.25, dtype=torch.bfloat16)
            engine.backward(engine(x, "third second first"), last=number == count - 1)
        return {s.name: s.grad.clone() for s in engine.shards}


# ---- layout and padding -----------------------------------------------------------------


def padding(recipe: dict) -> dict[str, Any]:
    """Train with NaN where DeepSpeed leaves memory uncleared; return what padding holds after."""
    original_fill, original_export = zero_engine.fill_slices, loop.train_step
    found: dict[str, Any] = {}

    def fill(slices: list, read: Any) -> None:
        for item in slices:
            item.param.ds_tensor.data.fill_(math.nan)
        original_fill(slices, read)

    def look(job: Any, rows: Tensor, step: int) -> Any:
        result = original_export(job, rows, step)
        shards = job.engine.shards
        tails = [i.param.ds_tensor.data.view(-1)[i.length :].float() for i in shards.slices]
        for item in shards.slices:
            if item.name not in shards._masters:
                continue
            sub_group, start = shards._masters[item.name]
            flat = shards._optimizer.fp32_partitioned_groups_flat[sub_group]
            part = item.param.partition_numel()
            tails.append(flat.detach()[start + item.length : start + part])
        found["padding"] = torch.cat(tails)
        return result

    with mock.patch.object(zero_engine, "fill_slices", fill):
        with mock.patch.object(loop, "train_step", look):
            command(recipe)
    return found


def layout(recipe: dict) -> dict[str, Any]:
    """Return types, slices and buffers of a training engine on the tiny model."""
    parsed = validate_recipe(recipe)
    here = world()
    source = open_source(parsed, here)
    engine = start_engine(parsed, here, source, plan=None, training=True)
    wanted = {}
    for item in engine.shards.slices:
        flat = source.folder.read_flat(item.name, item.start, item.length, item.working.dtype)
        wanted[item.name] = torch.equal(item.working, flat)
    buffers = {n.removeprefix("model."): b for n, b in engine.module.named_buffers()}
    optimizer = engine._engine.optimizer
    return {
        "working": {str(item.working.dtype) for item in engine.shards.slices},
        "masters": {str(engine.shards.master(item).dtype) for item in engine.shards.slices},
        "right": wanted,
        "lengths": {item.name: (item.start, item.length) for item in engine.shards.slices},
        "buffers": buffers,
        "accumulation": str(optimizer.grad_partitions_flat_buffer.dtype),
        "decays": [group["weight_decay"] for group in optimizer.optimizer.param_groups],
        "clip": engine._engine.gradient_clipping(),
        "persistent": len(optimizer.persistent_parameters),
    }


def wrong_precision(config_path: str) -> str:
    """Ask for fp32 under a bf16 configuration; return the refusal."""
    world()
    config = engine_config(tiny_recipe("bfloat16", config_path), dist.get_world_size())
    try:
        construct_partitioned(Parts, config, torch.float32)
    except ForgetScaleError as error:
        return str(error)
    return "accepted"


# ---- weights ----------------------------------------------------------------------------


def edited_params(recipe: dict, probe: list[list[int]], evaluate_first: bool) -> dict[str, Any]:
    """Edit masters on the slices, carry them over, and return what forward makes of them."""
    parsed = validate_recipe(recipe)
    here = world()
    engine = start_engine(parsed, here, open_source(parsed, here), plan=None, training=True)
    ids = torch.tensor(probe)
    kept: list[str] = []
    engine.set_training(False)
    if evaluate_first:
        # Once DeepSpeed knows the order it keeps parameters gathered from forward for backward; a
        # forward pass alone leaves them so.
        engine.set_training(True)
        for _ in range(2):
            engine.backward(engine(ids, ids, cross_entropy), last=True)
            engine.step(0.0)
        engine(ids, ids, cross_entropy)
        engine.set_training(False)
        kept = [i.name for i in engine.shards.slices if i.param.ds_status.name == "AVAILABLE"]
    for shard in engine.shards:
        positions = torch.arange(shard.start, shard.start + shard.param.numel())
        shard.param.add_(0.01 * torch.sin(positions.float()))
    engine.shards.write_params()
    with torch.no_grad():
        logits = engine(ids, mode="logits").float()
    names = [item.name for item in engine.shards.slices]
    gathered = {m.name: engine.gather_working(m, 0) for m in engine.matrices()}
    return {
        "logits": logits,
        "masters": engine.shards.gather(names),
        "working": gathered,
        "kept": kept,
    }


# ---- numbers that are not finite --------------------------------------------------------


def not_finite(recipe: dict, where: str, step: int, rank: int) -> dict[str, Any]:
    """Train until a number on one rank is not finite; return the error and what changed.

    Args:
        recipe: The recipe.
        where: ``loss``, ``gradient`` (an element that may move) or ``frozen`` (one that may not).
        step: Step in which it happens.
        rank: Rank on which it happens.
    """
    found: dict[str, Any] = {"changed": None}
    calls = {"step": 0}
    original_step, original_check = loop.train_step, ZeroShards.non_finite

    def snapshot(shards: ZeroShards) -> list[Tensor]:
        kept = [t.clone() for i in shards.slices for t in shards.states(i).values()]
        kept.append(torch.tensor(shards.optimizer_steps))
        return kept + [i.working.clone() for i in shards.slices]

    def train_step(job: Any, rows: Tensor, number: int) -> Any:
        calls["step"] = number
        if where == "loss" and number == step and dist.get_rank() == rank:
            job.method.loss = lambda logits, labels: cross_entropy(logits, labels) * math.nan
        before = snapshot(job.engine.shards)
        result = original_step(job, rows, number)
        if result.bad is not None:
            after = snapshot(job.engine.shards)
            same = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
            found["changed"] = not same
        return result

    def non_finite(self: ZeroShards) -> str | None:
        if where != "loss" and calls["step"] == step and dist.get_rank() == rank:
            for item in self.slices:
                if item.name.endswith("layers.1.mlp.down_proj.weight"):
                    mask = self.masks[item.name]
                    frozen = mask.frozen_elements(torch.arange(item.length)).tolist()
                    free = sorted(set(range(item.length)) - set(frozen))
                    index = (frozen if where == "frozen" else free)[3]
                    self.gradient(item)[index] = math.inf if where == "gradient" else math.nan
        return original_check(self)

    with (
        mock.patch.object(loop, "train_step", train_step),
        mock.patch.object(ZeroShards, "non_finite", non_finite),
    ):
        try:
            command(recipe)
        except NonFiniteError as error:
            found["error"] = str(error)
    return found

"""Try a recipe for real, without keeping anything: estimates, then two steps with rate 0."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from forgetscale.api import EDITS_GRADIENTS, Method, overrides
from forgetscale.config import Recipe
from forgetscale.config.deepspeed import accumulation_steps
from forgetscale.data import open_data, open_stream
from forgetscale.engine.adapters import find_adapters
from forgetscale.engine.estimate import MemoryEstimate, estimate_memory, trace_recipe
from forgetscale.engine.extras import open_extras
from forgetscale.engine.flops import model_flops_per_token
from forgetscale.engine.loop import accumulate, count_targets
from forgetscale.engine.memory.protection import protection_bytes, refresh_bytes
from forgetscale.engine.metrics import memory_bytes
from forgetscale.engine.micro_batches import batches_of
from forgetscale.engine.protection import Protection, adapted
from forgetscale.engine.run import num_train_steps
from forgetscale.engine.stand_in import assume_plan
from forgetscale.engine.start import open_source, plan_layout, start_engine
from forgetscale.masks import CompactLayout, factor_shapes
from forgetscale.models import build_skeleton, parameter_shapes, read_model_config
from forgetscale.zero3 import World

NUM_STEPS = 2


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a recipe will need."""

    num_parameters: int
    num_frozen: int
    """Elements the plan freezes."""
    num_adapter: int
    """Elements of the adapter's factors."""
    layout: str
    """``full``, ``masked``, ``compact`` or ``adapter``: how the engine will store the plan."""
    plan_source: str
    """Where the plan comes from that this was computed with."""
    num_steps: int
    target_tokens_per_step: int
    flops_per_token: int
    """Operations the model needs, recomputation left out."""
    executed_flops_per_token: int
    """Operations of one micro-batch as it runs, recomputation included."""
    memory: MemoryEstimate


@dataclass(frozen=True, slots=True)
class Trial:
    """What the mock step showed."""

    loss: float
    step_seconds: float
    memory_bytes: int


def layout_name(layout: CompactLayout | None) -> str:
    """Return ``full``, ``masked``, ``compact`` or ``adapter``."""
    if layout is None:
        return "full"
    if layout.adapters:
        return "adapter"
    return "compact" if layout.pieces else "masked"


def look_ahead(
    recipe: Recipe, world_size: int, make_method: Callable[[Any], Method], *, device: str
) -> tuple[Outlook, Protection]:
    """Compute the needs of a recipe from configuration files alone; no weights, no ranks.

    Args:
        recipe: Resolved recipe.
        world_size: Number of ranks.
        make_method: Makes the method from its recipe section.
        device: ``cuda`` or ``cpu``, where training will compute.

    Returns:
        The needs, and what is trained, with which they were computed.
    """
    config = read_model_config(recipe.model.path, recipe.model.attn_implementation)
    skeleton = build_skeleton(config)
    shapes = parameter_shapes(skeleton)
    data = open_data(recipe.data)
    assumed = assume_plan(recipe, skeleton, data, make_method)
    kept = adapted(assumed.plan, find_adapters(recipe, skeleton), shapes)
    layout = plan_layout(recipe, skeleton, kept.plan, kept.adapters)
    method = make_method(recipe.method)
    trace = trace_recipe(
        recipe,
        config,
        layout,
        block=data.block_size,
        world_size=world_size,
        device=device,
        loss=method.loss,
    )
    memory = estimate_memory(
        recipe,
        shapes,
        layout,
        trace,
        world_size=world_size,
        device=device,
        edits_gradients=overrides(method, EDITS_GRADIENTS),
        protection=protection_bytes(recipe, skeleton, shapes, world_size),
        refresh=refresh_bytes(recipe, shapes, world_size),
    )
    targets_per_row = data.targets_per_row(document_mask=recipe.data.document_mask)
    outlook = Outlook(
        num_parameters=sum(torch.Size(shape).numel() for shape in shapes.values()),
        num_frozen=0 if kept.plan is None else kept.plan.num_frozen(shapes),
        num_adapter=sum(math.prod(s) for s in factor_shapes(kept.adapters).values()),
        layout=layout_name(layout),
        plan_source="the adapter leaves every weight" if kept.adapters else assumed.source,
        num_steps=num_train_steps(recipe, targets_per_row),
        target_tokens_per_step=round(recipe.train.global_batch_size * targets_per_row),
        flops_per_token=model_flops_per_token(skeleton, layout, data.block_size),
        executed_flops_per_token=trace.flops // (recipe.train.micro_batch_size * data.block_size),
        memory=memory,
    )
    return outlook, kept


def mock_steps(recipe: Recipe, method: Method, world: World, kept: Protection) -> Trial:
    """Run two whole steps with learning rate 0 on the first rows of the stream.

    The second is timed. Nothing is written, and no weight changes.

    Args:
        recipe: Resolved recipe.
        method: Its method.
        world: This process among all.
        kept: What is trained and how it is stored, from ``look_ahead``.

    Collective: every rank must call it.
    """
    data = open_data(recipe.data, recipe.model.path)
    source = open_source(recipe, world)
    mask = recipe.data.document_mask
    engine = start_engine(
        recipe, world, source, plan=kept.plan, training=True, adapters=kept.adapters
    )
    engine.set_training(True)
    stream = open_stream(
        data,
        seed=recipe.data.shuffle_seed,
        global_batch_size=recipe.train.global_batch_size,
        rank=world.rank,
        world_size=world.size,
        documents=mask,
    )
    extras = open_extras(recipe, method.loss, data, world, source)
    count = accumulation_steps(recipe, world.size)
    loss_sum, seconds, num_targets = 0.0, 0.0, 1
    for _ in range(NUM_STEPS):
        rows = next(stream)
        start = time.perf_counter()
        size = recipe.train.micro_batch_size
        extra = extras.of_rows(rows)
        batches = batches_of(rows, size=size, count=count, document_mask=mask, extra=extra)
        num_targets = count_targets(batches, world)
        loss_sum = float(accumulate(engine, method.loss, batches, num_targets, extras=extras))
        engine.shards.freeze(decay=0.0)
        engine.step(lr=0.0)
        seconds = time.perf_counter() - start
    total = float(world.sum(torch.tensor([loss_sum], dtype=torch.float64)))
    extras.close()
    trial = Trial(total / num_targets, seconds, memory_bytes())
    engine.destroy()
    return trial

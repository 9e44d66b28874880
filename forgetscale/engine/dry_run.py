"""Try a recipe for real, without keeping anything: estimates, then two steps with rate 0."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from forgetscale.api import Method
from forgetscale.config import Recipe
from forgetscale.config.deepspeed import accumulation_steps
from forgetscale.data import open_data, open_stream
from forgetscale.engine.estimate import MemoryEstimate, estimate_memory, flops_per_token
from forgetscale.engine.loop import accumulate, batches_of, count_targets
from forgetscale.engine.metrics import memory_bytes
from forgetscale.engine.run import num_train_steps
from forgetscale.engine.start import open_source, start_engine
from forgetscale.models import build_skeleton, parameter_shapes, read_model_config
from forgetscale.zero3 import World

NUM_STEPS = 2


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a recipe will need."""

    num_parameters: int
    num_steps: int
    target_tokens_per_step: int
    flops_per_token: int
    memory: MemoryEstimate


@dataclass(frozen=True, slots=True)
class Trial:
    """What the mock step showed."""

    loss: float
    step_seconds: float
    memory_bytes: int


def look_ahead(recipe: Recipe, world_size: int, draw: Callable[[Any], frozenset[str]]) -> Outlook:
    """Compute the needs of a recipe from configuration files alone; no weights, no ranks.

    Args:
        recipe: Resolved recipe.
        world_size: Number of ranks.
        draw: Tells from the model's structure which parameters will be frozen whole.
    """
    config = read_model_config(recipe.model.path, recipe.model.attn_implementation)
    skeleton = build_skeleton(config)
    shapes = parameter_shapes(skeleton)
    frozen_whole = draw(skeleton)
    data = open_data(recipe.data)
    block = data.block_size
    targets_per_row = data.targets_per_row(document_mask=recipe.data.document_mask)
    embedding = skeleton.get_input_embeddings().weight
    tied = skeleton.get_output_embeddings().weight is embedding
    name = next(n for n, p in skeleton.named_parameters() if p is embedding)
    return Outlook(
        num_parameters=sum(torch.Size(shape).numel() for shape in shapes.values()),
        num_steps=num_train_steps(recipe, targets_per_row),
        target_tokens_per_step=round(recipe.train.global_batch_size * targets_per_row),
        flops_per_token=flops_per_token(
            shapes, "" if tied else name, config.num_hidden_layers, config.hidden_size, block
        ),
        memory=estimate_memory(
            recipe,
            shapes,
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            world_size=world_size,
            frozen_whole=frozen_whole,
        ),
    )


def mock_steps(recipe: Recipe, method: Method, world: World) -> Trial:
    """Run two whole steps with learning rate 0 on the first rows of the stream.

    The second is timed. Nothing is written, and no weight changes.
    Collective: every rank must call it.
    """
    data = open_data(recipe.data, recipe.model.path)
    source = open_source(recipe, world)
    mask = recipe.data.document_mask
    engine = start_engine(recipe, world, source, plan=None, training=True)
    engine.set_training(True)
    stream = open_stream(
        data,
        seed=recipe.data.shuffle_seed,
        global_batch_size=recipe.train.global_batch_size,
        rank=world.rank,
        world_size=world.size,
        documents=mask,
    )
    count = accumulation_steps(recipe, world.size)
    loss_sum, seconds, num_targets = 0.0, 0.0, 1
    for _ in range(NUM_STEPS):
        rows = next(stream)
        start = time.perf_counter()
        size = recipe.train.micro_batch_size
        batches = batches_of(rows, size=size, count=count, document_mask=mask)
        num_targets = count_targets(batches, world)
        loss_sum = float(accumulate(engine, method.loss, batches, num_targets))
        engine.shards.freeze(decay=0.0)
        engine.step(lr=0.0)
        seconds = time.perf_counter() - start
    total = float(world.sum(torch.tensor([loss_sum], dtype=torch.float64)))
    trial = Trial(total / num_targets, seconds, memory_bytes())
    engine.destroy()
    return trial

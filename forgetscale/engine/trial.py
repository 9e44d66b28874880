"""A short training of the source model that is thrown away: how target data move its weights."""

from __future__ import annotations

from collections.abc import Callable

import torch

from forgetscale.config import Recipe
from forgetscale.config.deepspeed import accumulation_steps
from forgetscale.data import TrainingData, open_stream
from forgetscale.engine.loop import accumulate, count_targets
from forgetscale.engine.micro_batches import batches_of
from forgetscale.errors import NonFiniteError
from forgetscale.ops.losses import cross_entropy
from forgetscale.progress import Progress
from forgetscale.zero3 import World, ZeroEngine
from forgetscale.zero3.engine import ReadSlice


def train_and_subtract(
    engine: ZeroEngine,
    recipe: Recipe,
    data: TrainingData,
    read: ReadSlice,
    progress: Callable[[int], Progress],
    *,
    num_steps: int,
    lr: float,
) -> ZeroEngine:
    """Train an engine from the start of the stream and subtract the source from its masters.

    Decay, clipping, batch and order are the recipe's, the loss is plain cross-entropy.

    Args:
        engine: Freshly built over the source model, with an optimizer and no freeze plan.
        recipe: Resolved recipe.
        data: Data that is trained on.
        read: Reader of the source model.
        progress: Makes the progress display from the number of steps.
        num_steps: Optimizer steps, > 0.
        lr: Constant learning rate.

    Returns:
        The engine; its fp32 masters now hold changes, so it must not be trained further.

    Raises:
        NonFiniteError: A loss or gradient is not finite.

    Collective: every rank must call it.
    """
    world, train = engine.world, recipe.train
    mask = recipe.data.document_mask
    engine.set_training(True)
    stream = open_stream(
        data,
        seed=recipe.data.shuffle_seed,
        global_batch_size=train.global_batch_size,
        rank=world.rank,
        world_size=world.size,
        documents=mask,
    )
    count = accumulation_steps(recipe, world.size)
    with progress(num_steps) as display:
        for step in range(1, num_steps + 1):
            world.stop_if_asked("during the trial training")
            batch = next(stream)
            batches = batches_of(
                batch, size=train.micro_batch_size, count=count, document_mask=mask
            )
            num_targets = count_targets(batches, world)
            loss = accumulate(engine, cross_entropy, batches, num_targets)
            _require_finite(engine, world, float(loss), step)
            engine.shards.freeze(decay=lr * recipe.optim.weight_decay)
            engine.step(lr)
            display.update(step)
    for item in engine.shards.slices:
        if item.length:
            source = read(item.name, item.start, item.length, item.working.dtype)
            master = engine.shards.master(item)
            master.sub_(source.to(master.device, torch.float32))
    return engine


def _require_finite(engine: ZeroEngine, world: World, loss: float, step: int) -> None:
    name = engine.shards.non_finite()
    bad = "the loss" if loss != loss or abs(loss) == float("inf") else name
    for rank, found in enumerate(world.gather_objects(bad)):
        if found is not None:
            raise NonFiniteError(
                f"trial step {step}: {found} is not finite on rank {rank}; no weight was changed;"
                " lower method.trial_lr or inspect the data."
            )

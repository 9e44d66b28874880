"""Measuring again while a run goes on: a method's view of the live weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from forgetscale.api import Method
from forgetscale.checkpoint import CheckpointStore
from forgetscale.config import CalibrationConfig, Recipe
from forgetscale.engine.bases import drop_refreshed, keep_refreshed
from forgetscale.engine.metrics import RunLog
from forgetscale.engine.plans import calibration_for
from forgetscale.engine.start import SourceModel, start_engine
from forgetscale.zero3 import ReadSlice, World, ZeroEngine

Refresh = Callable[[int], None]
"""Lets the method measure again after so many steps. Collective: every rank must call it."""


@torch.no_grad()
def live_weights(engine: ZeroEngine) -> ReadSlice:
    """Return a reader of this rank's slices as they are now, an adapter's update merged.

    A second engine over as many ranks cuts parameters at the same places, so a rank reads its own
    memory. Factors are gathered once and held until the reader goes.

    Args:
        engine: The model that is trained; not one whose layout cuts matrices.

    Collective: every rank must call it.
    """
    shards, pairs = engine.shards, engine.layout.adapters
    items = {item.name: item for item in shards.slices}
    factors = {name: shards.gather(list(pair.factor_shapes())) for name, pair in pairs.items()}

    def read(name: str, start: int, length: int, kind: torch.dtype) -> Tensor:
        item = items[name]
        assert (item.start, item.length) == (start, length), (name, item.start, start)
        values = shards.master(item)
        if name in pairs and length:
            values = values.float() + _update(pairs[name], factors[name], start, length)
        return values.to(kind)

    return read


def _update(pair: Any, factors: dict[str, Tensor], start: int, length: int) -> Tensor:
    """Return elements of the flattened update of a matrix."""
    width = pair.shape[1]
    top, end = start // width, -(-(start + length) // width)
    rows = factors | {pair.lora_B: factors[pair.lora_B][top:end]}
    found: Tensor = pair.delta(rows).reshape(-1)
    return found[start - top * width :][:length]


def make_refresh(
    recipe: Recipe,
    world: World,
    source: SourceModel,
    method: Method,
    engine: ZeroEngine,
    store: CheckpointStore,
    log: RunLog,
) -> Refresh:
    """Return what lets a method measure again at the weights of the moment.

    A second model with those weights exists while it does: 2 bytes a weight at bf16 over all ranks
    for factors of sides, a training engine's states for diagonals and flattened directions.

    Args:
        recipe: Resolved recipe.
        world: This process among all.
        source: The source model.
        method: The protection.
        engine: The model that is trained.
        store: Checkpoints, which say which older estimates are still needed.
        log: Log of the run.
    """

    def refresh(step: int) -> None:
        every = method.refresh_steps
        assert every is not None
        with torch.random.fork_rng():
            calibration = _calibration(recipe, world, source, engine, step, log)
            try:
                method.refresh(calibration, step)
            finally:
                calibration.close()
        world.on_main(lambda: drop_refreshed(recipe, store.steps(), every, step))
        log(f"step {step}: measured Fisher information again")

    return refresh


def _calibration(
    recipe: Recipe,
    world: World,
    source: SourceModel,
    engine: ZeroEngine,
    step: int,
    log: RunLog,
) -> Any:
    found = calibration_for(recipe, world, source, log)
    read = live_weights(engine)
    section: Any = recipe.method
    held_out: CalibrationConfig | None = section.refresh.calibration
    config = held_out or found.config
    return replace(
        found,
        # Labels are drawn anew each time.
        seed=recipe.run.seed + step,
        build=lambda: start_engine(recipe, world, source, plan=None, training=False, read=read),
        build_training=lambda: start_engine(
            recipe, world, source, plan=None, training=True, read=read
        ),
        config=config,
        token_set=None if config is None else found.open_set(config),
        keep_basis=partial(keep_refreshed, recipe, world, step),
    )

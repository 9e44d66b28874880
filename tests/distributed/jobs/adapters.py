"""Jobs that look at adapters before and during training."""

from __future__ import annotations

from torch import Tensor

from forgetscale.config import validate_recipe
from forgetscale.engine.adapters import find_adapters
from forgetscale.engine.protection import adapted
from forgetscale.engine.start import open_source, start_engine
from forgetscale.zero3 import ZeroEngine
from tests.distributed.jobs.shards import world


def build(recipe: dict) -> ZeroEngine:
    """Build the engine of a recipe with an adapter."""
    parsed, here = validate_recipe(recipe), world()
    source = open_source(parsed, here)
    kept = adapted(None, find_adapters(parsed, source.skeleton), source.shapes)
    return start_engine(parsed, here, source, plan=kept.plan, training=True, adapters=kept.adapters)


def start(recipe: dict) -> dict[str, Tensor]:
    """Return the factors before training."""
    engine = build(recipe)
    return engine.shards.gather(list(engine.layout.factors()))

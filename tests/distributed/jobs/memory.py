"""Jobs that compare the memory model with what engines hold."""

from __future__ import annotations

from typing import Any

from forgetscale.checkpoint.snapshot import HostCopies
from forgetscale.config import validate_recipe
from forgetscale.data import open_data
from forgetscale.engine.adapters import find_adapters
from forgetscale.engine.memory import copy_bytes, state_bytes
from forgetscale.engine.protection import adapted
from forgetscale.engine.stand_in import assume_plan
from forgetscale.engine.start import open_source, plan_layout, start_engine
from forgetscale.methods import METHODS
from tests.distributed.jobs.shards import world


def states(recipes: dict[str, dict]) -> dict[str, Any]:
    """Return predicted and measured bytes of the state of each recipe."""
    here = world()
    found = {}
    for name, recipe in recipes.items():
        parsed = validate_recipe(recipe)
        source = open_source(parsed, here)
        assumed = assume_plan(
            parsed, source.skeleton, open_data(parsed.data), lambda c: METHODS[c.kind](c)
        )
        kept = adapted(assumed.plan, find_adapters(parsed, source.skeleton), source.shapes)
        layout = plan_layout(parsed, source.skeleton, kept.plan, kept.adapters)
        predicted = state_bytes(parsed, source.shapes, layout, here.size)
        engine = start_engine(
            parsed, here, source, plan=kept.plan, training=True, adapters=kept.adapters
        )
        copies = HostCopies()
        copies.take(engine)
        found[name] = {
            "predicted_copies": copy_bytes(parsed, source.shapes, layout, here.size, locked=False),
            "copies": copies.num_bytes,
            "predicted": predicted.measured_parts(),
            "measured": engine.shards.state_bytes(),
            "offloaded": (predicted.offloaded, engine.shards.offloaded),
            "cut": 0 if layout is None else len(layout.pieces),
        }
        engine.destroy()
    return found

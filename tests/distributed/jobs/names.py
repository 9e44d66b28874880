"""Which of DeepSpeed's names exist."""

from __future__ import annotations

import importlib
from typing import Any

from forgetscale.config import validate_recipe
from forgetscale.engine.start import open_source, start_engine
from tests.distributed.jobs.shards import world


def present(recipe: dict, names: dict[str, list[str]]) -> dict[str, Any]:
    """Return the names that are missing on a training engine, by the object they belong to."""
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload

    parsed = validate_recipe(recipe)
    here = world()
    engine = start_engine(parsed, here, open_source(parsed, here), plan=None, training=True)
    objects = {
        "engine": engine._engine,
        "optimizer": engine._engine.optimizer,
        # What the engine calls its optimizer where there is none.
        "forward_only": DeepSpeedZeRoOffload,
        "param": engine.shards.slices[0].param,
        "comm": importlib.import_module("deepspeed.comm.torch"),
    }
    missing = {k: [n for n in v if not hasattr(objects[k], n)] for k, v in names.items()}
    return {"missing": missing}

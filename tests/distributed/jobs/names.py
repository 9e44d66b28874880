"""Which of DeepSpeed's names exist."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from forgetscale.config import validate_recipe
from forgetscale.engine.start import open_source, start_engine
from tests.distributed.jobs.shards import world


def present(recipe: dict, names: dict[str, list[str]]) -> dict[str, Any]:
    """Return the names that are missing on a training engine, by the object they belong to."""
    parsed = validate_recipe(recipe)
    here = world()
    engine = start_engine(parsed, here, open_source(parsed, here), plan=None, training=True)
    objects = {
        "engine": engine._engine,
        "optimizer": engine._engine.optimizer,
        "param": engine.shards.slices[0].param,
        "comm": importlib.import_module("deepspeed.comm.torch"),
    }
    missing = {k: [n for n in v if not hasattr(objects[k], n)] for k, v in names.items()}
    arguments = {
        name: list(inspect.signature(getattr(engine._engine, name)).parameters)
        for name in ("save_checkpoint", "load_checkpoint")
    }
    return {"missing": missing, "arguments": arguments}

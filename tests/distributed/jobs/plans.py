"""Jobs that make freeze plans without training."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from forgetscale.config import validate_recipe
from forgetscale.engine.metrics import RunLog
from forgetscale.engine.run import calibration_for, make_plan, open_source
from forgetscale.methods import METHODS
from forgetscale.methods.ssu.method import input_norms, weight_norms
from forgetscale.methods.ssu.targets import find_targets
from tests.distributed.jobs.shards import world


def make(recipes: dict[str, dict]) -> dict[str, Any]:
    """Return the plan of each recipe: columns, rows, whole names, content hash."""
    here = world()
    log = RunLog(Path(tempfile.mkdtemp()) / "log.txt", visible=False)
    found = {}
    for name, recipe in recipes.items():
        parsed = validate_recipe(recipe)
        source = open_source(parsed, here)
        plan = make_plan(parsed, here, source, METHODS[parsed.method.kind](parsed.method), log)
        found[name] = {
            "columns": {k: v.tolist() for k, v in plan.columns.items()},
            "rows": {k: v.tolist() for k, v in plan.rows.items()},
            "whole": sorted(plan.whole),
            "hash": plan.content_hash(),
            "provenance": dict(plan.provenance),
        }
    return found


def statistics(recipe: dict) -> dict[str, Any]:
    """Return input statistics and weight norms as every rank sees them."""
    here = world()
    log = RunLog(Path(tempfile.mkdtemp()) / "log.txt", visible=False)
    parsed = validate_recipe(recipe)
    source = open_source(parsed, here)
    calibration = calibration_for(parsed, here, source, log)
    targets = find_targets(calibration.structure)
    try:
        return {
            "l2_norm": input_norms(calibration, targets, "l2_norm"),
            "mean_square": input_norms(calibration, targets, "mean_square"),
            "weight_l1": weight_norms(calibration, targets, 1),
            "weight_l2": weight_norms(calibration, targets, 2),
            "passes": sum(1 for _ in calibration.batches()),
        }
    finally:
        calibration.close()

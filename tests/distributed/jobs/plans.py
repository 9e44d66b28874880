"""Jobs that make freeze plans without training."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from forgetscale.config import validate_recipe
from forgetscale.engine.metrics import RunLog
from forgetscale.engine.plans import calibration_for, make_plan
from forgetscale.engine.start import open_source
from forgetscale.methods import METHODS
from forgetscale.methods.ssu.scores import column_scores_of, input_statistics, weight_norms
from forgetscale.methods.ssu.statistics import InputStatistics, run_pass
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
        if plan is None:
            found[name] = {"hash": None}
            continue
        found[name] = {
            "elements": {k: v.tolist() for k, v in plan.elements.items()},
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
            **input_statistics(calibration, targets, parsed.method),
            "weight_l1": weight_norms(calibration, targets, 1),
            "weight_l2": weight_norms(calibration, targets, 2),
            "owner": _owners(calibration, targets),
            "passes": sum(1 for _ in calibration.batches()),
        }
    finally:
        calibration.close()


def _owners(calibration: Any, targets: list) -> dict[str, str]:
    live = calibration.named_modules()
    modules = {target.module: live[target.module] for target in targets}
    statistics = InputStatistics(modules, calibration.num_blocks)
    run_pass(calibration, [statistics])
    return statistics.owner


def scores(recipes: dict[str, dict]) -> dict[str, Any]:
    """Return the column scores of each recipe, and what of the model stays gathered after them."""
    here = world()
    log = RunLog(Path(tempfile.mkdtemp()) / "log.txt", visible=False)
    found: dict[str, Any] = {}
    for name, recipe in recipes.items():
        parsed = validate_recipe(recipe)
        source = open_source(parsed, here)
        calibration = calibration_for(parsed, here, source, log)
        targets = find_targets(calibration.structure)
        score = parsed.method.score
        try:
            found[name] = column_scores_of(calibration, targets, [score], parsed.method)[score]
            live = calibration._engine.module
            found[f"{name}/gathered"] = [
                n
                for n, p in live.named_parameters()
                if p.ds_status.name != "NOT_AVAILABLE" and not p.ds_persist
            ]
            found[f"{name}/gradients"] = [
                n for n, p in live.named_parameters() if p.grad is not None
            ]
            found[f"{name}/training"] = [n for n, m in live.named_modules() if m.training]
        finally:
            calibration.close()
    return found

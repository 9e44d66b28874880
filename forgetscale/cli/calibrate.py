"""Make a freeze plan or a Fisher basis from the source model and source data; no training."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from forgetscale.cli.inputs import check_alignment_data
from forgetscale.cli.recipe_options import add_recipe_options, read_recipe, running_world
from forgetscale.config import STRUCTURES_OF, Recipe
from forgetscale.engine import RunLog, make_plan, open_source, write_plan
from forgetscale.engine.bases import write_basis
from forgetscale.engine.plans import calibration_for
from forgetscale.engine.start import SourceModel
from forgetscale.errors import ConfigError
from forgetscale.methods import METHODS
from forgetscale.methods.fisher import measure_basis
from forgetscale.projections.basis import KINDS
from forgetscale.zero3 import World

EXAMPLES = """examples:
  forgetscale calibrate --config run.yaml --output plans/ne-paper
  deepspeed --num_gpus 8 --module forgetscale calibrate --config run.yaml --output plans/ne-paper
  forgetscale train --config run.yaml --set method.plan=plans/ne-paper

  forgetscale calibrate --kind fisher --config run.yaml --output fisher/alignment
  forgetscale train --config run.yaml --set method.basis=fisher/alignment

train makes plan and basis by itself when method.plan or method.basis is not set.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add_recipe_options(parser)
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="folder of the plan or basis"
    )
    parser.add_argument(
        "--kind",
        choices=["plan", "fisher"],
        default="plan",
        help="freeze plan (ssu, hft, lota, s2ft) or Fisher basis (ewc, alignguard)"
        " (default: %(default)s)",
    )


def run(options: argparse.Namespace) -> None:
    """Run the command. Collective: every rank must call it."""
    recipe = read_recipe(options)
    output: Path = options.output
    if options.kind == "fisher":
        needed = _needed_structures(recipe)
        with running_world(output.parent / f"{output.name}-log") as (world, log):
            world.on_main(lambda: check_alignment_data(recipe))
            _write_fisher(recipe, world, open_source(recipe, world), needed, output, log)
        return
    method = METHODS[recipe.method.kind](recipe.method)
    with running_world(output.parent / f"{output.name}-log") as (world, log):
        source = open_source(recipe, world)
        plan = make_plan(recipe, world, source, method, log)
        if plan is None:
            raise ConfigError(
                f"method.kind {recipe.method.kind} freezes nothing for good, so there is no plan to"
                " make; choose ssu, hft, lota or s2ft."
            )
        write_plan(output, plan, recipe, world)
        frozen = plan.num_frozen(source.shapes)
        log(f"wrote {output}: {frozen:,} elements frozen in {len(source.shapes)} parameters")


def _needed_structures(recipe: Recipe) -> tuple[str, ...]:
    method: Any = recipe.method
    if not hasattr(method, "fisher") or not hasattr(method, "basis"):
        raise ConfigError(
            f"method.kind {method.kind} uses no Fisher basis; choose ewc, online_ewc,"
            " alignguard, ewc_lora or alignguard_lora."
        )
    if method.calibration is None:
        raise ConfigError(
            "a Fisher basis is measured on data; set method.calibration.path to a token set."
        )
    if getattr(method, "previous", None) is not None:
        raise ConfigError(
            "method.previous belongs to a run, which adds the information of earlier tasks to its"
            " own; leave it out here."
        )
    return STRUCTURES_OF[method.reading] if hasattr(method, "reading") else ("diagonal",)


def _write_fisher(
    recipe: Recipe,
    world: World,
    source: SourceModel,
    needed: tuple[str, ...],
    output: Path,
    log: RunLog,
) -> None:
    method: Any = recipe.method
    calibration = calibration_for(recipe, world, source, log)
    try:
        measured = measure_basis(
            calibration, method.fisher, method.calibration, needed, method.target_modules
        )
    finally:
        calibration.close()
    basis = write_basis(output, measured, recipe, world)
    parts = ", ".join(f"{len(basis.names(k))} {k}" for k in KINDS if basis.names(k))
    log(f"wrote {output}: {parts}; from {basis.payload['num_rows']} rows")
    if (cosine := basis.payload.get("contrast_cosine")) is not None:
        log(f"contrast: mean cosine {cosine:.4f} to the directions without it; 1: no difference")

"""Make a freeze plan from the source model and source data, without training."""

from __future__ import annotations

import argparse
from pathlib import Path

from forgetscale.cli.recipe_options import add_recipe_options, read_recipe, running_world
from forgetscale.engine import make_plan, open_source, write_plan
from forgetscale.errors import ConfigError
from forgetscale.methods import METHODS

EXAMPLES = """examples:
  forgetscale calibrate --config run.yaml --output plans/ne-paper
  deepspeed --num_gpus 8 --module forgetscale calibrate --config run.yaml --output plans/ne-paper
  forgetscale train --config run.yaml --set method.plan=plans/ne-paper

train makes the plan by itself when method.plan is not set.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add_recipe_options(parser)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="plan folder")


def run(options: argparse.Namespace) -> None:
    """Run the command. Collective: every rank must call it."""
    recipe = read_recipe(options)
    method = METHODS[recipe.method.kind](recipe.method)
    output: Path = options.output
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

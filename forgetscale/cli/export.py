"""Write the newest good checkpoint of a run as a Hugging Face folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from forgetscale.cli.recipe_options import add_recipe_options, read_recipe, running_world
from forgetscale.engine import export_checkpoint
from forgetscale.methods import METHODS

EXAMPLES = """examples:
  forgetscale export --config runs/a/recipe.yaml
  deepspeed --num_gpus 8 --module forgetscale export --config runs/a/recipe.yaml --output out/a

Use as many processes as wrote the checkpoint.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add_recipe_options(parser)
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="target folder (default: RUN/export)"
    )


def run(options: argparse.Namespace) -> None:
    """Run the command. Collective: every rank must call it."""
    recipe = read_recipe(options)
    method = METHODS[recipe.method.kind](recipe.method)
    directory = options.output or recipe.run.output_dir / "export"
    with running_world(recipe.run.output_dir) as (world, log):
        export_checkpoint(recipe, method, world, log, directory)

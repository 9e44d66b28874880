"""Look at a model and data without training: one analysis at a time.

The recipe says which model, which data and how documents are masked; its protection and loss do not
matter unless an analysis says so. Analyses of a source and a tuned model folder need no recipe.
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

from forgetscale.analysis import ANALYSES, FOLDER_ANALYSES, two_models
from forgetscale.cli.recipe_options import add_recipe_options, read_recipe, running_world
from forgetscale.errors import ConfigError

EXAMPLES = """examples:
  forgetscale analyze --cache-logits --config run.yaml            writes method.loss.reference.cache
  deepspeed --num_gpus 8 --module forgetscale analyze --cache-logits --config run.yaml \\
      --top-k 32 --stored-dtype float16 --output caches/chats

  forgetscale analyze --landscape --config runs/a/recipe.yaml --output runs/a-landscape
  forgetscale analyze --landscape --config run.yaml --output landscape \\
      --models before=models/m sft=runs/sft/export eaft=runs/eaft/export

  forgetscale analyze --delta --source base --tuned runs/a/export --output runs/a-delta
  forgetscale analyze --mastery --model base --facts facts.jsonl --templates templates.json \
      --output runs/mastery
  forgetscale analyze --token-kl --source base --tuned runs/a/export --prompts prompts.jsonl \
      --answer-tokens all --output runs/a-kl                     two 13B models: --memory stream

The same --cache-logits command goes on where it was stopped.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options, each analysis its own."""
    add_recipe_options(parser, required=False)
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder that is written")
    which = parser.add_mutually_exclusive_group(required=True)
    two_models.add_arguments(parser.add_argument_group("options of analyses of model folders"))
    for name, path in (*ANALYSES.items(), *FOLDER_ANALYSES.items()):
        module = importlib.import_module(path)
        which.add_argument(
            f"--{name}", dest="analysis", action="store_const", const=name, help=module.SUMMARY
        )
        module.add_arguments(parser.add_argument_group(f"options of --{name}"))


def run(options: argparse.Namespace) -> None:
    """Run the command. Collective: every rank must call it."""
    if options.analysis in FOLDER_ANALYSES:
        importlib.import_module(FOLDER_ANALYSES[options.analysis]).run(options)
        return
    if options.config is None:
        raise ConfigError(f"--{options.analysis} needs a recipe; name it with --config.")
    recipe = read_recipe(options)
    module = importlib.import_module(ANALYSES[options.analysis])
    output: Path = module.output_of(options, recipe)
    with running_world(output.parent / f"{output.name}-log") as (world, log):
        module.run(options, recipe, world, log)

"""Let a model write dialogues with itself, or answers: any number of workers, every id once.

Start the command as often as there is hardware for, at any time: workers find their work in the
folder generate.output_dir, which they share. Kill any of them; start it again. The result is the
folder dialogues/ in it, read by python -m data_prep build --sft.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from forgetscale.cli.recipe_options import running_world
from forgetscale.config import GenerateRecipe, load_generate_recipe, load_recipe
from forgetscale.errors import ConfigError
from forgetscale.generation.central import select_central
from forgetscale.generation.engines.zero3 import require_launcher
from forgetscale.generation.run import run_group, run_worker
from forgetscale.generation.soft_targets import write_soft_cache
from forgetscale.generation.status import read_status
from forgetscale.generation.style import measure_style
from forgetscale.models import trust_code
from forgetscale.stop import StopRequest

EXAMPLES = """examples:
  forgetscale generate --config self.yaml                 one worker; start more of them at will
  srun --ntasks 16 --gpus-per-task 1 forgetscale generate --config self.yaml
  deepspeed --num_gpus 8 --module forgetscale generate --config self.yaml \\
      --set generate.engine.kind=zero3                    a model that fits no other way
  forgetscale generate --status runs/self                 how far it is
  forgetscale generate --soft-cache train.yaml --dialogues runs/self/dialogues
  forgetscale generate --style train.yaml --tuned runs/a/export --output runs/a/results
  forgetscale generate --keep-central 200 --dialogues runs/ssr/dialogues --encoder models/roberta \\
      --output runs/ssr-kept                              last stage of dialogue kind ssr
  python -m data_prep build --sft --input runs/self/dialogues --tokenizer MODEL \\
      --block-size 4096 --output data/self-4096

self.yaml:
  model: {path: models/OLMo-2-1124-7B-Instruct}
  generate: {output_dir: runs/self, num_dialogues: 100000,
             dialogue: {kind: pre_query, turns: 1}}

dialogue kinds: pre_query (the model goes on from the user's header), own_instruction, seed_topic,
prompts (answers to given prompts), sdft and ssr (comparisons).
Send SIGUSR1 or SIGTERM to stop with all finished work kept (exit code 75).
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("--config", type=Path, metavar="self.yaml", help="recipe")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help="change one field, such as --set generate.num_dialogues=1000 (repeatable)",
    )
    parser.add_argument(
        "--soft-cache",
        type=Path,
        metavar="train.yaml",
        help="write the logit cache that this training recipe names (method.loss.reference.cache)"
        " from what the model said while it wrote --dialogues (generate.soft_targets)",
    )
    parser.add_argument(
        "--dialogues", type=Path, nargs="+", default=[], metavar="DIR", help="result folders"
    )
    parser.add_argument(
        "--style",
        type=Path,
        metavar="train.yaml",
        help="measure the sets of this training recipe under its model: surprise, gradient cosine,"
        " with --tuned drift; writes style.json into --output",
    )
    parser.add_argument("--tuned", type=Path, metavar="DIR", help="model folder after training")
    parser.add_argument(
        "--keep-central",
        type=int,
        metavar="N",
        help="write a diverse, central part of --dialogues into --output",
    )
    parser.add_argument("--encoder", type=Path, metavar="DIR", help="embeds for --keep-central")
    parser.add_argument("--clusters", type=int, default=20, metavar="K", help="of --keep-central")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="folder of --style or --keep-central"
    )
    parser.add_argument(
        "--print-engine", action="store_true", help="print generate.engine.kind, and stop"
    )
    parser.add_argument(
        "--status", type=Path, metavar="DIR", help="print how far the run in DIR is, and stop"
    )


def run(options: argparse.Namespace) -> None:
    """Run one worker, or print the status of a run."""
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if options.status is not None:
        print("\n".join(read_status(options.status).lines()))
        return
    if options.style is not None:
        if options.output is None:
            raise ConfigError("--style needs --output, the folder for style.json.")
        recipe = load_recipe(options.style, options.set)
        found = measure_style(recipe, options.output, tuned=options.tuned)
        print(json.dumps({"nll": found["nll"], "cosine": found["cosine"]}))
        return
    if options.soft_cache is not None:
        _write_soft_cache(options)
        return
    if options.keep_central is not None:
        _keep_central(options)
        return
    if options.config is None:
        raise ConfigError("give --config with a recipe, or --status with the folder of a run.")
    wanted = load_generate_recipe(options.config, options.set)
    if wanted.model.trust_remote_code:
        trust_code(wanted.model.path, _say)
    kind = wanted.generate.engine.kind
    if options.print_engine:
        print(kind)
    elif kind == "zero3":
        _generate_together(wanted)
    else:
        _generate(wanted)


def _generate_together(recipe: GenerateRecipe) -> None:
    """Be one rank of the one worker that all ranks are."""
    require_launcher()
    with running_world(recipe.generate.output_dir / "logs") as (world, _):
        payload = run_group(recipe, world, say=_say)
        if world.is_main:
            _print(payload)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _print(payload: dict[str, Any]) -> None:
    shown = ("num_dialogues", "num_ids", "counts", "num_tokens", "num_supervised_tokens")
    print(json.dumps({name: payload[name] for name in shown}))


def _generate(recipe: GenerateRecipe) -> None:
    stop = StopRequest()
    stop.listen()
    try:
        payload = run_worker(
            recipe,
            should_stop=lambda: stop.requested,
            say=_say,
        )
    finally:
        stop.close()
    _print(payload)


def _keep_central(options: argparse.Namespace) -> None:
    if len(options.dialogues) != 1 or options.encoder is None or options.output is None:
        raise ConfigError(
            "--keep-central needs one --dialogues folder, --encoder, a model folder, and --output."
        )
    payload = select_central(
        options.dialogues[0],
        options.output,
        options.encoder,
        num_kept=options.keep_central,
        num_clusters=options.clusters,
    )
    _print(payload)


def _write_soft_cache(options: argparse.Namespace) -> None:
    recipe = load_recipe(options.soft_cache, options.set)
    reference = getattr(recipe.method.loss, "reference", None)
    if reference is None or reference.cache is None:
        raise ConfigError(
            f"{options.soft_cache} names no cache to write: set method.loss to {{kind: kl,"
            " reference: {cache: DIR}}."
        )
    if not options.dialogues:
        raise ConfigError("--soft-cache needs --dialogues, the folders the rows were built from.")
    payload = write_soft_cache(recipe, options.dialogues, reference.cache)
    print(json.dumps(payload["num_targets_by_kind"]))

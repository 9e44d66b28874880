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

from transformers.utils import logging as transformers_logging

from forgetscale.config import load_generate_recipe
from forgetscale.errors import ConfigError
from forgetscale.generation.run import run_worker
from forgetscale.generation.status import read_status
from forgetscale.stop import StopRequest

EXAMPLES = """examples:
  forgetscale generate --config self.yaml                 one worker; start more of them at will
  srun --ntasks 16 --gpus-per-task 1 forgetscale generate --config self.yaml
  forgetscale generate --status runs/self                 how far it is
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
        "--status", type=Path, metavar="DIR", help="print how far the run in DIR is, and stop"
    )


def run(options: argparse.Namespace) -> None:
    """Run one worker, or print the status of a run."""
    if options.status is not None:
        print("\n".join(read_status(options.status).lines()))
        return
    if options.config is None:
        raise ConfigError("give --config with a recipe, or --status with the folder of a run.")
    recipe = load_generate_recipe(options.config, options.set)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    stop = StopRequest()
    stop.listen()
    try:
        payload = run_worker(
            recipe,
            should_stop=lambda: stop.requested,
            say=lambda line: print(line, file=sys.stderr, flush=True),
        )
    finally:
        stop.close()
    shown = ("num_dialogues", "num_ids", "counts", "num_tokens", "num_supervised_tokens")
    print(json.dumps({name: payload[name] for name in shown}))

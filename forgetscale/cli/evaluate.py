"""Measure a model folder on tasks: perplexity, recall, compliance, refusal, code-mixing.

Each process loads a whole copy of the model and takes its share of the questions.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from forgetscale.cli.recipe_options import running_world
from forgetscale.cli.train import measure_folder
from forgetscale.config import EvaluateConfig
from forgetscale.errors import ConfigError
from forgetscale.evaluation import available_tasks
from forgetscale.models import trust_code

EXAMPLES = """examples:
  forgetscale evaluate --model runs/a/export --task-dir tasks --output results/a
  deepspeed --num_gpus 8 --module forgetscale evaluate --model runs/a/export --task-dir tasks \\
      --tasks recall perplexity/target lm_eval/belebele --output results/a
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="model folder")
    parser.add_argument("--task-dir", type=Path, required=True, metavar="DIR", help="task folder")
    parser.add_argument("--tasks", nargs="+", metavar="NAME", help="tasks (default: all there)")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="result folder")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="sequences at once")
    parser.add_argument(
        "--max-new-tokens", type=int, default=64, metavar="N", help="longest answer"
    )
    parser.add_argument(
        "--allow-code",
        nargs="+",
        default=[],
        metavar="NAME",
        help="tasks of lm-evaluation-harness whose Python files may be run",
    )
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the Python files of the model folder; each is logged with its hash",
    )
    parser.add_argument("--seed", type=int, default=42, metavar="N", help="seed of the intervals")


def run(options: argparse.Namespace) -> None:
    """Run the command. Collective: every rank must call it."""
    tasks = tuple(options.tasks or available_tasks(options.task_dir))
    if not tasks:
        raise ConfigError(f"--task-dir {options.task_dir} holds no tasks; check the path.")
    try:
        config = EvaluateConfig(
            tasks=tasks,
            task_dir=options.task_dir,
            batch_size=options.batch_size,
            max_new_tokens=options.max_new_tokens,
            allow_code=tuple(options.allow_code),
        )
    except ValueError as error:
        raise ConfigError(f"{error}.") from error
    output: Path = options.output
    with running_world(output.parent / f"{output.name}-log") as (world, log):
        if options.trust_remote_code:
            trust_code(options.model, log)
        measure_folder(config, options.model, output, options.seed, world, log)

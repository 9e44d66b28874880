"""Parse the command, run it, turn errors into one sentence and an exit code."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from forgetscale import __version__
from forgetscale.errors import (
    AuditError,
    ConfigError,
    ForgetScaleError,
    NonFiniteError,
    RetentionError,
    StoppedEarly,
)

COMMANDS = {
    "quickstart": "learn a language and measure what was forgotten, on this machine, in minutes",
    "check": "resolve a recipe, print it, estimate memory, run one mock step, stop",
    "calibrate": "source data -> importance scores -> freeze plan",
    "analyze": "look at model and data: keep predictions, see what fights the model",
    "train": "run a recipe; starts again where it stopped",
    "generate": "a model's dialogues with itself, or answers; any number of workers",
    "evaluate": "measure a model folder on tasks",
    "export": "checkpoint -> Hugging Face folder",
    "preflight": "look at every node before a job over several (launch/slurm.sh does)",
    "prompts": "your own safe and unsafe prompts -> refusal tasks",
    "safelora": "project an adapter onto what alignment changed",
    "report": "one or more runs -> report.html and report.json",
    "restore": "put back what tuning should not have changed; merge tuned models",
}

EPILOG = """examples:
  forgetscale quickstart
  forgetscale check --config run.yaml
  deepspeed --num_gpus 8 --module forgetscale train --config run.yaml
  forgetscale report --runs runs/a runs/b --output runs/report
  forgetscale restore --source base --tuned tuned --output out --score relative --fraction 0.2

exit codes: 0 done; 2 recipe or input wrong; 75 stopped early, start again; 1 anything else
"""


def build_parser(chosen: str | None = None) -> argparse.ArgumentParser:
    """Return the parser; only the chosen command is imported, so that help is quick.

    Args:
        chosen: Name of the command whose options are needed; None for the list of commands.
    """
    parser = argparse.ArgumentParser(
        prog="forgetscale",
        description="Adapt large language models on ZeRO-3 without losing what they know.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"forgetscale {__version__}")
    # The DeepSpeed launcher puts this in front of the command.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        if name != chosen:
            commands.add_parser(name, help=summary)
            continue
        module = importlib.import_module(f"forgetscale.cli.{name}")
        command = commands.add_parser(
            name,
            help=summary,
            description=module.__doc__,
            epilog=module.EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


# Raised alike on every rank, so that rank 0 can speak for all.
_COMMON = (ConfigError, AuditError, NonFiniteError, RetentionError, StoppedEarly)


def _report_error(error: ForgetScaleError) -> None:
    rank = int(os.environ.get("RANK", "0"))
    size = int(os.environ.get("WORLD_SIZE", "1"))
    common = isinstance(error, _COMMON)
    if error.said_elsewhere or (common and rank != 0):
        return
    where = f" (rank {rank})" if size > 1 and not common else ""
    print(f"forgetscale: error{where}: {error}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    chosen = next((word for word in given if word in COMMANDS), None)
    options = build_parser(chosen).parse_args(given)
    try:
        options.run(options)
    except ForgetScaleError as error:
        _report_error(error)
        return error.exit_code
    except OSError as error:
        name = "" if error.filename is None else f"{error.filename}: "
        print(f"forgetscale: error: {name}{error.strerror or error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        print("forgetscale: interrupted", file=sys.stderr)
        return 130
    _leave_mark()
    return 0


def _leave_mark() -> None:
    """Tell ``launch/slurm_job.sh`` that this rank came to its end.

    A killed launcher of DeepSpeed ends with 0 (``runner.py`` passes on positive codes alone).
    """
    folder = os.environ.get("FORGETSCALE_SCRATCH")
    if folder:
        (Path(folder) / f"done-{os.environ.get('RANK', '0')}").touch()

"""Options and start-up shared by commands that run a recipe on one or more processes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers.utils import logging as transformers_logging

from forgetscale.config import Recipe, load_recipe, require_roots
from forgetscale.config.deepspeed import read_deepspeed
from forgetscale.engine import RunLog
from forgetscale.engine.metrics import LOG_FILE
from forgetscale.models import trust_code
from forgetscale.zero3 import World, launcher_rank, lost_peer, start_world, stop_world


def add_recipe_options(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add ``--config`` and ``--set``."""
    parser.add_argument("--config", type=Path, required=required, metavar="run.yaml", help="recipe")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help="change one field, such as --set method.frozen_fraction=0.4 (repeatable)",
    )
    parser.add_argument(
        "--root",
        action="append",
        type=Path,
        default=[],
        metavar="DIR",
        help="refuse a recipe that names a path outside these folders (repeatable; default: all)",
    )


def read_recipe(options: argparse.Namespace) -> Recipe:
    """Load the recipe and check its paths and its DeepSpeed JSON, before any work."""
    recipe = load_recipe(options.config, options.set)
    require_roots(recipe, getattr(options, "root", ()), "--root")
    read_deepspeed(recipe.deepspeed)
    if recipe.model.trust_remote_code:
        trust_code(recipe.model.path, say_on_main)
    return recipe


def say_on_main(line: str) -> None:
    """Print a line to the terminal, on the launcher's first process only."""
    if launcher_rank() == 0:
        print(line, file=sys.stderr, flush=True)


def log_path(directory: Path) -> Path:
    """Return this rank's log file: ``log.txt`` for rank 0, ``logs/`` for the others."""
    rank = launcher_rank()
    return directory / LOG_FILE if rank == 0 else directory / "logs" / f"rank-{rank:05d}.txt"


@contextmanager
def running_world(directory: Path) -> Iterator[tuple[World, RunLog]]:
    """Join the process group for the length of a command; logs go below ``directory``.

    SIGUSR1 and SIGTERM are taken as a request to stop, see ``World.stop_if_asked``.
    """
    path = log_path(directory)
    world = start_world(path)
    world.stop.listen()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield world, RunLog(path, world.is_main)
    except RuntimeError as error:
        sentence = lost_peer(error)
        if sentence is None:
            raise
        raise sentence from error
    finally:
        world.watchdog.close()
        world.stop.close()
        stop_world()

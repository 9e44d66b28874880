"""Options of analyses that compare a source model's folder with a tuned one, without a recipe."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from forgetscale.errors import ConfigError
from forgetscale.knowledge.restore import Place, read_ranks
from forgetscale.models.raw import refuse_folder


def add_arguments(parser: Any) -> None:
    """Add the options."""
    add = parser.add_argument
    add("--source", type=Path, metavar="DIR", help="model before tuning")
    add("--tuned", type=Path, metavar="DIR", help="tuned model")
    add("--include", metavar="REGEX", help="only tensors whose name matches")
    add("--exclude", metavar="REGEX", help="not tensors whose name matches")
    add("--workers", type=int, metavar="N", help="local processes (default: cores, at most 8)")
    add("--rank", type=int, metavar="R", help="of independent ranks (default: RANK or 0)")
    add("--world-size", type=int, metavar="N", help="ranks (default: WORLD_SIZE or 1)")


def read_folders(options: argparse.Namespace) -> tuple[Path, Path]:
    """Return source and tuned folder.

    Raises:
        ConfigError: One is not named.
        DataError: One cannot be used.
    """
    for name in ("source", "tuned", "output"):
        if getattr(options, name) is None:
            raise ConfigError(f"--{options.analysis} needs --{name}; name a folder.")
    for folder in (options.source, options.tuned):
        refuse_folder(folder)
    return options.source, options.tuned


def read_place(options: argparse.Namespace) -> Place:
    """Return output, processes and ranks.

    Raises:
        ConfigError: The output, the rank or the number of workers is missing or impossible.
    """
    return read_ranks(options.output, options.workers, options.rank, options.world_size, os.environ)

"""What tuning changed: shares of the change by fraction, tensor, layer and module, and a null."""

from __future__ import annotations

import argparse
from fractions import Fraction
from typing import Any

from forgetscale.analysis.two_models import read_folders, read_place
from forgetscale.errors import ConfigError
from forgetscale.knowledge.delta_report import analyse_delta
from forgetscale.knowledge.edits import EditOptions, parse_fraction
from forgetscale.knowledge.setup import Request
from forgetscale.knowledge.work import start_process

SUMMARY = "who holds which share of the change, beside a random update; needs no recipe"
FRACTIONS = ("0.01", "0.03", "0.05", "0.1", "0.2", "0.4", "0.6")


def add_arguments(parser: Any) -> None:
    """Add the options of this analysis."""
    add = parser.add_argument
    add("--fractions", nargs="+", default=FRACTIONS, metavar="F",
        help=f"shares of most changed weights (default: {' '.join(FRACTIONS)})")  # fmt: skip
    add("--eps", type=float, default=1e-8, metavar="E",
        help="added to the source weight's size (default: %(default)s)")  # fmt: skip
    add("--null-elements", type=int, default=1 << 28, metavar="N",
        help="most elements of the random update (default: 2^28)")  # fmt: skip


def run(options: argparse.Namespace) -> None:
    """Write ``delta.html`` and ``delta.json``.

    Raises:
        ConfigError: An option is missing or out of range.
        DataError: A model cannot be used, or the output exists.
    """
    source, tuned = read_folders(options)
    fractions: set[Fraction] = {parse_fraction(text) for text in options.fractions}
    if not 0 < min(fractions):
        raise ConfigError("--fractions must be above 0.")
    if options.null_elements < 1:
        raise ConfigError(f"--null-elements must be >= 1, got {options.null_elements}.")
    edit = EditOptions(fractions=tuple(sorted(fractions)), eps=options.eps)
    request = Request(source, (tuned,), edit, include=options.include, exclude=options.exclude)
    start_process()
    place = read_place(options)
    page = analyse_delta(request, place, print, null_elements=options.null_elements)
    if place.rank == 0:
        print(page)

"""Write a page (opens offline) with its numbers as JSON: from run folders, or evaluated models."""

from __future__ import annotations

import argparse
from pathlib import Path

from forgetscale.evaluation.report import build_models_report, build_report

EXAMPLES = """examples:
  forgetscale report --runs runs/a --output runs/a
  forgetscale report --runs runs/sft-* runs/ssu-* --output runs/comparison
  forgetscale report --results results/source results/sft results/ssu --output results/comparison
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--runs", type=Path, nargs="+", metavar="DIR", help="runs -> report.html")
    what.add_argument(
        "--results",
        type=Path,
        nargs="+",
        metavar="DIR",
        help="results of evaluate, the model to compare with first -> models.html",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="report folder")
    parser.add_argument("--title", help="headline of the report")


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    if options.results:
        title = options.title or "Evaluated models"
        print(build_models_report(options.results, options.output, title=title))
        return
    print(build_report(options.runs, options.output, title=options.title or "Retention report"))

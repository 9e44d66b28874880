"""Write report.html (opens offline) and report.json from one or more run folders."""

from __future__ import annotations

import argparse
from pathlib import Path

from forgetscale.evaluation.report import build_report

EXAMPLES = """examples:
  forgetscale report --runs runs/a --output runs/a
  forgetscale report --runs runs/sft-* runs/ssu-* --output runs/comparison
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("--runs", type=Path, nargs="+", required=True, metavar="DIR", help="runs")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="report folder")
    parser.add_argument("--title", default="Retention report", help="headline of the report")


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    path = build_report(options.runs, options.output, title=options.title)
    print(path)

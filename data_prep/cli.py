"""Command line of data preparation."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep import inspect, languages
from data_prep.cli_build import BUILD_EXAMPLES, add_build_arguments, explain, note_kept_work
from forgetscale.errors import ForgetScaleError

_VERIFY_EXAMPLES = """examples:
  python -m data_prep verify data/am-512

Checks every byte and names file, record batch and rows of each damage.
Exit codes: 0 intact; 2 damaged or no token set."""

_STATS_EXAMPLES = """examples:
  python -m data_prep stats data/am-512
  python -m data_prep stats data/am-512 --json
  python -m data_prep stats data/am-512 --html am-512.html"""


def _add_command(commands: Any, name: str, help_text: str, examples: str) -> Any:
    return commands.add_parser(
        name,
        help=help_text,
        description=help_text[0].upper() + help_text[1:] + ".",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep",
        description="Prepare token sets for training, calibration and evaluation.",
        epilog="python -m data_prep COMMAND --help shows options and examples of a command.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    build = _add_command(
        commands, "build", "turn raw text or chats into a token set", BUILD_EXAMPLES
    )
    add_build_arguments(build)
    verify = _add_command(commands, "verify", "check every byte of a token set", _VERIFY_EXAMPLES)
    verify.set_defaults(run=_run_verify)
    look = _add_command(commands, "inspect", "show documents of a row or step", inspect.EXAMPLES)
    inspect.add_arguments(look)
    fertile = _add_command(
        commands,
        "fertility",
        "measure the tokens each language costs",
        languages.FERTILITY_EXAMPLES,
    )
    languages.add_fertility(fertile)
    extend = _add_command(
        commands, "extend-vocabulary", "add target pieces to a model", languages.EXTEND_EXAMPLES
    )
    languages.add_extend(extend)
    stats = _add_command(commands, "stats", "print counts of a token set", _STATS_EXAMPLES)
    stats.add_argument("--json", action="store_true", help="print JSON")
    stats.add_argument("--html", type=Path, metavar="FILE", help="write a page with plots too")
    stats.set_defaults(run=_run_stats)
    for command in (verify, stats):
        command.add_argument("directory", type=Path, metavar="DIR", help="token set folder")
    return parser


def _run_verify(args: argparse.Namespace) -> int:
    from forgetscale.data import TokenSet, find_damages

    is_damaged = False
    for sentence in find_damages(args.directory):
        print(f"error: {sentence}", file=sys.stderr)
        is_damaged = True
    if is_damaged:
        return 2
    token_set = TokenSet(args.directory)
    print(
        f"{args.directory}: intact; {token_set.num_rows:,} rows in"
        f" {len(token_set.payload['shards'])} shard(s), content hash {token_set.content_hash}."
    )
    return 0


def _run_stats(args: argparse.Namespace) -> int:
    from data_prep.reports import collect_stats, format_stats

    stats = collect_stats(args.directory)
    print(json.dumps(stats, indent=1, ensure_ascii=False) if args.json else format_stats(stats))
    if args.html is not None:
        from data_prep.page import write_text
        from data_prep.stats_page import stats_page

        write_text(args.html, stats_page(args.directory))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 2 input wrong, 1 anything else."""
    args = _parser().parse_args(argv)
    try:
        code: int = args.run(args)
    except (ForgetScaleError, OSError) as error:
        code = explain(error, args)
        note_kept_work(args)
    except KeyboardInterrupt:
        print("error: stopped; nothing was published.", file=sys.stderr)
        note_kept_work(args)
        code = 130
    return code

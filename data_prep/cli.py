"""Command line of data preparation."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from data_prep import inspect
from forgetscale.errors import ForgetScaleError

_BUILD_EXAMPLES = """examples:
  Amharic of MADLAD-400 for continual pre-training:
    python -m data_prep build --input MADLAD-400/data/am --split clean \\
        --tokenizer models/OLMo-2-1124-7B-Instruct --block-size 512 --output data/am-512

  the same from the root of a MADLAD-400 copy, release v1.5, 250,000 sampled documents:
    python -m data_prep build --input MADLAD-400 --language ne --release v1p5 \\
        --max-documents 250000 --seed 42 \\
        --tokenizer models/OLMo-2-1124-7B-Instruct --block-size 512 --output data/ne-512

  chats for calibration (rows {"messages": [{"role": ..., "content": ...}, ...]}):
    python -m data_prep build --input tulu.jsonl --chat --max-documents 2000 --seed 42 \\
        --max-document-tokens 2048 \\
        --tokenizer models/OLMo-2-1124-7B-Instruct --block-size 2048 --output data/calibration

Lines that are no documents go to rejects.jsonl in the output (file, line, reason); the build
fails, leaving nothing, if they are more than --max-reject-fraction of all lines.
Escapes: MADLAD-400 writes line breaks as backslash + n; \\n, \\t, \\r and \\\\ are undone in one
left-to-right pass over the field text (--escapes keep turns this off); messages of chats are
never changed.
Exit codes: 0 done; 2 input or options wrong, one sentence says what; 1 anything else."""

_VERIFY_EXAMPLES = """examples:
  python -m data_prep verify data/am-512

Checks every byte and names file, record batch and rows of each damage.
Exit codes: 0 intact; 2 damaged or no token set."""

_STATS_EXAMPLES = """examples:
  python -m data_prep stats data/am-512
  python -m data_prep stats data/am-512 --json"""


def _add_command(commands: Any, name: str, help_text: str, examples: str) -> Any:
    return commands.add_parser(
        name,
        help=help_text,
        description=help_text[0].upper() + help_text[1:] + ".",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def _add_build(commands: Any) -> None:
    build = _add_command(
        commands, "build", "turn raw text or chats into a token set", _BUILD_EXAMPLES
    )
    add = build.add_argument
    add(
        "--input",
        nargs="+",
        required=True,
        action="extend",
        metavar="PATH_OR_GLOB",
        help=".jsonl, .txt (both also .gz, .zst), .parquet or .arrow files, folders of one kind, or"
        " glob patterns; read in this order, each folder and pattern sorted by name",
    )
    add("--tokenizer", type=Path, required=True, metavar="DIR", help="folder AutoTokenizer loads")
    add("--block-size", type=int, required=True, metavar="N", help="tokens a row")
    add("--output", type=Path, required=True, metavar="DIR", help="folder to make; must not exist")
    add("--language", metavar="LANG", help="--input is the root of a MADLAD-400 copy; take LANG")
    add(
        "--split",
        choices=("clean", "noisy"),
        help="MADLAD-400 split (default: clean with --language, else whatever a folder holds)",
    )
    add(
        "--release",
        choices=("v1", "v1p5"),
        help="MADLAD-400 release, where a copy holds a language in both",
    )
    add(
        "--max-documents",
        type=int,
        metavar="N",
        help="take a seeded sample of N documents, in input order (default and 0: all); reads the"
        " input twice",
    )
    _add_build_details(add)
    _add_reading(add)
    build.set_defaults(run=_run_build)


def _add_build_details(add: Callable[..., Any]) -> None:
    """Add the options of ``build`` that have a default."""
    add("--seed", type=int, default=0, metavar="N", help="seed of that sample (default 0)")
    add(
        "--chat",
        action="store_true",
        help="render rows with 'messages' by the tokenizer's chat template, all turns, no"
        " generation prompt; rows with only 'text' stay plain documents",
    )
    add(
        "--packing",
        choices=("concat", "best-fit"),
        default="concat",
        help="concat: one text cut every N tokens, as in the SSU paper; best-fit: only documents"
        " longer than N are cut, a little padding remains (default concat)",
    )
    add(
        "--document-end",
        choices=("eos", "none"),
        default="eos",
        help="append the end-of-sequence token to each document that does not end in it already"
        " (default eos)",
    )
    add(
        "--escapes",
        choices=("undo", "keep"),
        default="undo",
        help="undo MADLAD-400 escapes in 'text' (default undo)",
    )
    add(
        "--max-document-tokens",
        type=int,
        metavar="N",
        help="cut longer documents to N tokens, before the end token (default: never)",
    )
    add(
        "--max-reject-fraction",
        type=float,
        default=0.05,
        metavar="F",
        help="fail if more than this share of the lines is rejected (default 0.05)",
    )
    add(
        "--num-processes",
        type=int,
        metavar="N",
        help="processes that tokenise (default: all cores, none extra for small input); the output"
        " is the same for any N",
    )
    add("--log", type=Path, metavar="FILE", help="append progress lines to FILE")


def _add_reading(add: Callable[..., Any]) -> None:
    """Add the options about fields and the limits that keep bad files from doing harm."""
    add(
        "--text-field",
        default="text",
        metavar="NAME",
        help="JSON field or table column with the text (default text)",
    )
    add(
        "--text-documents",
        choices=("line", "paragraph", "file"),
        default="line",
        help="what one document is in .txt files (default line)",
    )
    add(
        "--max-line-bytes",
        type=int,
        default=256 << 20,
        metavar="N",
        help="set longer lines or rows aside as rejects (default 256 MiB)",
    )
    add(
        "--max-ratio",
        type=float,
        default=200.0,
        metavar="X",
        help="fail if a file of more than 16 MiB grows more than X times when decompressed"
        " (default 200)",
    )
    add(
        "--max-file-bytes",
        type=int,
        default=1 << 40,
        metavar="N",
        help="fail if a file has more bytes than this once decompressed (default 1 TiB)",
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep",
        description="Prepare token sets for training, calibration and evaluation.",
        epilog="python -m data_prep COMMAND --help shows options and examples of a command.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_build(commands)
    verify = _add_command(commands, "verify", "check every byte of a token set", _VERIFY_EXAMPLES)
    verify.set_defaults(run=_run_verify)
    look = _add_command(commands, "inspect", "show documents of a row or step", inspect.EXAMPLES)
    inspect.add_arguments(look)
    stats = _add_command(commands, "stats", "print counts of a token set", _STATS_EXAMPLES)
    stats.add_argument("--json", action="store_true", help="print JSON")
    stats.set_defaults(run=_run_stats)
    for command in (verify, stats):
        command.add_argument("directory", type=Path, metavar="DIR", help="token set folder")
    return parser


def _run_build(args: argparse.Namespace) -> int:
    from data_prep.build import BuildOptions, build

    names = {name: value for name, value in vars(args).items() if name not in ("command", "run")}
    payload = build(BuildOptions(inputs=tuple(names.pop("input")), **names))
    rejects = payload["rejects"]["num_rejects"]
    print(
        f"{args.output}: {payload['num_rows']:,} rows of {payload['block_size']} tokens from"
        f" {payload['num_documents']:,} documents, {payload['num_text_bytes']:,} bytes of text;"
        f" {payload['packing']['dropped_tail_tokens']} tokens left over at the end;"
        f" {payload['row_shares']['cut_share']:.1%} of documents cut,"
        f" {payload['row_shares']['padding_share']:.2%} padding."
    )
    if rejects:
        print(
            f"warning: {rejects} lines are no documents; see {args.output / 'rejects.jsonl'}.",
            file=sys.stderr,
        )
    return 0


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
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 2 input wrong, 1 anything else."""
    args = _parser().parse_args(argv)
    try:
        code: int = args.run(args)
    except ForgetScaleError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        place = error.filename or (args.output if args.command == "build" else args.directory)
        print(
            f"error: {args.command} stopped at {place}: {error.strerror or error}; nothing was"
            " published; repair that and run it again.",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("error: stopped; nothing was published.", file=sys.stderr)
        return 130
    return code

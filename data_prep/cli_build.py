"""Arguments of ``python -m data_prep build``, and running it alone or as one of several ranks."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_prep.conversations import FORMATS
from forgetscale.errors import ForgetScaleError

_PACKING_NAMES = {"best_fit": "best-fit", "concatenate": "concat"}

BUILD_EXAMPLES = """examples:
  Amharic of MADLAD-400 for continual pre-training, all cores of this machine:
    python -m data_prep build --input MADLAD-400/data/am --split clean \\
        --tokenizer models/OLMo-2-1124-7B-Instruct --block-size 512 --output data/am-512

  the same on many nodes that share a file system (pip install 'forgetscale[mpi]'):
    srun --mpi=pmi2 --ntasks 64 python -m data_prep build ...    (or mpiexec -n 64 python ...)

  from the root of a MADLAD-400 copy, release v1.5, 250,000 sampled documents:
    python -m data_prep build --input MADLAD-400 --language ne --release v1p5 \\
        --max-documents 250000 --seed 42 \\
        --tokenizer models/OLMo-2-1124-7B-Instruct --block-size 512 --output data/ne-512

  cleaned: no duplicates, mostly Devanagari, nothing of the evaluation sets, 1 % held out:
    python -m data_prep build --input MADLAD-400/data/ne --split clean \\
        --deduplicate near --script Devanagari --min-words 20 --decontaminate eval/*.jsonl \\
        --holdout-fraction 0.01 --max-tokens 200000000 \\
        --tokenizer models/OLMo-2-1124-7B-Instruct --block-size 512 --output data/ne-512

  chats for calibration (rows {"messages": [{"role": ..., "content": ...}, ...]}):
    python -m data_prep build --input tulu.jsonl --chat --max-documents 2000 --seed 42 \\
        --max-document-tokens 2048 \\
        --tokenizer models/OLMo-2-1124-7B-Instruct --block-size 2048 --output data/calibration

  conversations for supervised fine-tuning; messages, ShareGPT, Alpaca, prompt and completion:
    python -m data_prep build --sft --input chats.jsonl --long truncate \\
        --tokenizer models/OLMo-2-1124-7B-Instruct --block-size 4096 --output data/chats-4096

Order: lines that are no documents, empty ones, length, script and decontamination go first, then
duplicates, then the sample is drawn, then short documents by tokens and the budget; every document
left out is counted by reason in the manifest and by `stats`. Lines that are no documents stand in
rejects.jsonl (file, line, reason); the build fails if they are more than --max-reject-fraction.
A stopped build goes on where it was when the same command is started again (finished units are
kept in .NAME.work beside the output until it is published); the output is byte-identical for any
number of processes and nodes. SOURCE_DATE_EPOCH fixes the time in the manifest
and, with --sft, the day that chat templates such as Llama 3.2's take for today.
Escapes: MADLAD-400 writes line breaks as backslash + n; \\n, \\t, \\r and \\\\ are undone in one
left-to-right pass over the text of records (--escapes keep turns this off); messages of chats and
plain text files are never changed.
Exit codes: 0 done; 2 input or options wrong, one sentence says what; 1 anything else."""


def add_build_arguments(build: Any) -> None:
    """Add all options of ``build`` to its parser."""
    _add_input(build.add_argument_group("input").add_argument)
    _add_output(build.add_argument_group("output").add_argument)
    _add_choice(build.add_argument_group("which documents").add_argument)
    _add_filters(build.add_argument_group("documents to leave out").add_argument)
    _add_text(build.add_argument_group("documents to tokens").add_argument)
    _add_running(build.add_argument_group("limits and running").add_argument)
    build.set_defaults(run=run_build)


def _add_input(add: Callable[..., Any]) -> None:
    add(
        "--input",
        nargs="+",
        default=[],
        action="extend",
        metavar="PATH_OR_GLOB",
        help=".jsonl, .txt (both also .gz, .zst), .parquet or .arrow files, folders of one kind, or"
        " glob patterns; read in this order, each folder and pattern sorted by name",
    )
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
        "--dataset",
        metavar="NAME",
        help="instead of --input: a dataset of the Hugging Face hub (needs a network, runs no code"
        " of it) or a folder that datasets.load_dataset reads",
    )
    add("--dataset-config", metavar="NAME", help="its configuration")
    add("--dataset-split", default="train", metavar="NAME", help="its split (default train)")
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


def _add_output(add: Callable[..., Any]) -> None:
    add(
        "--tokenizer",
        type=Path,
        required=True,
        metavar="PATH",
        help="folder AutoTokenizer loads, or a raw SentencePiece .model file",
    )
    add("--block-size", type=int, required=True, metavar="N", help="tokens a row")
    add("--output", type=Path, required=True, metavar="DIR", help="folder to make; must not exist")
    add(
        "--packing",
        type=lambda name: _PACKING_NAMES.get(name, name),
        choices=("concat", "best-fit", "none"),
        help="concat: one text cut every N tokens, as in the SSU paper; best-fit: only documents"
        " longer than N are cut, a little padding remains; none: one conversation a row (default"
        " concat, with --sft best-fit)",
    )
    add(
        "--holdout-fraction",
        type=float,
        default=0.0,
        metavar="F",
        help="put this share of the documents, by a seeded hash of their text, into a second token"
        " set (default 0)",
    )
    add("--holdout-output", type=Path, metavar="DIR", help="its folder (default OUTPUT-holdout)")


def _add_choice(add: Callable[..., Any]) -> None:
    add(
        "--max-documents",
        type=int,
        metavar="N",
        help="take a seeded sample of N documents, in input order (default and 0: all); reads the"
        " input twice",
    )
    add(
        "--max-tokens",
        type=int,
        metavar="N",
        help="take no further document once there are N tokens; the rest is counted, not tokenised",
    )
    add("--seed", type=int, default=0, metavar="N", help="of sample and hold-out (default 0)")
    add(
        "--deduplicate",
        choices=("none", "exact", "near"),
        default="none",
        help="keep the first of documents with equal text, or also of nearly equal ones (MinHash,"
        " needs forgetscale[prep]); reads the input twice (default none)",
    )
    add(
        "--near-threshold",
        type=float,
        default=0.8,
        metavar="F",
        help="near: estimated Jaccard similarity of 5-word sequences (default 0.8)",
    )


def _add_filters(add: Callable[..., Any]) -> None:
    for name in ("characters", "words"):
        for bound in ("min", "max"):
            add(f"--{bound}-{name}", type=int, metavar="N", help=f"{bound}imum of {name}")
    add("--min-document-tokens", type=int, metavar="N", help="minimum of tokens, no end token")
    add(
        "--script",
        metavar="NAME",
        help="leave out documents whose letters are mostly of other Unicode scripts than this, such"
        " as Ethiopic or Deva",
    )
    add(
        "--min-script-fraction",
        type=float,
        default=0.5,
        metavar="F",
        help="least share of letters in --script (default 0.5)",
    )
    add(
        "--decontaminate",
        nargs="+",
        default=[],
        action="extend",
        metavar="PATH_OR_GLOB",
        help="leave out documents that share a sequence of words with any text in these files (all"
        " strings of each record count)",
    )
    add(
        "--decontaminate-ngram",
        type=int,
        default=13,
        metavar="N",
        help="words of such a sequence (default 13); shorter evaluation texts are not matched and"
        " counted in the manifest",
    )


def _add_text(add: Callable[..., Any]) -> None:
    add(
        "--chat",
        action="store_true",
        help="render rows with 'messages' by the tokenizer's chat template, all turns, no"
        " generation prompt; rows with only text stay plain documents",
    )
    add(
        "--sft",
        action="store_true",
        help="make SFT rows: conversations rendered by the tokenizer's chat template, in which the"
        " assistant's tokens and the ends of its turns are the targets (data.kind: sft)",
    )
    add(
        "--format",
        choices=FORMATS,
        default="auto",
        help="--sft: fields of a row; auto looks at each row (default auto)",
    )
    add(
        "--long",
        choices=("drop", "truncate", "error"),
        default="drop",
        help="--sft: conversations longer than a row are left out (drop), lose whole turns at the"
        " end so that they end with a whole answer (truncate), or are refused (error); always"
        " counted (default drop)",
    )
    add(
        "--document-end",
        choices=("eos", "none"),
        help="append the end-of-sequence token to each document that does not end in it already"
        " (default eos, with --sft none)",
    )
    add(
        "--escapes",
        choices=("undo", "keep"),
        default="undo",
        help="undo MADLAD-400 escapes in the text of records (default undo)",
    )
    add(
        "--max-document-tokens",
        type=int,
        metavar="N",
        help="cut longer documents to N tokens, before the end token (default: never)",
    )


def _add_running(add: Callable[..., Any]) -> None:
    add(
        "--max-reject-fraction",
        type=float,
        default=0.05,
        metavar="F",
        help="fail if more than this share of the lines is rejected (default 0.05)",
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
    add(
        "--num-processes",
        type=int,
        metavar="N",
        help="processes that tokenise (default: all cores, none extra for small input); not under"
        " mpiexec or srun, where each rank is one",
    )
    add("--log", type=Path, metavar="FILE", help="append progress lines to FILE")


def run_build(args: argparse.Namespace) -> int:
    """Build; under several ranks, an error on one of them ends all."""
    from data_prep.build import build
    from data_prep.options import BuildOptions
    from data_prep.team import mpi_team

    mpi = mpi_team()
    names = {name: value for name, value in vars(args).items() if name not in ("command", "run")}
    inputs, unwanted = tuple(names.pop("input")), tuple(names.pop("decontaminate"))
    try:
        options = BuildOptions(inputs=inputs, decontaminate=unwanted, **names)
        payload = build(options, mpi)
    except (ForgetScaleError, OSError) as error:
        if mpi is not None and mpi.started:
            code = explain(error, args, rank=mpi.rank)
            mpi.abort(code)
        if mpi is not None and mpi.rank > 0 and isinstance(error, ForgetScaleError):
            error.said_elsewhere = True
        raise
    if payload:
        _print_summary(payload, args.output)
    return 0


def explain(error: ForgetScaleError | OSError, args: argparse.Namespace, *, rank: int = 0) -> int:
    """Print what went wrong and what is kept; return the exit code."""
    where = f"rank {rank}: " if rank else ""
    if isinstance(error, ForgetScaleError):
        if not error.said_elsewhere:
            print(f"error: {where}{error}", file=sys.stderr)
        code = error.exit_code
    else:
        place = error.filename or getattr(args, "output", None) or getattr(args, "directory", "?")
        print(
            f"error: {where}{args.command} stopped at {place}: {error.strerror or error}; nothing"
            " was published; repair that and run it again.",
            file=sys.stderr,
        )
        code = 1
    return code


def note_kept_work(args: argparse.Namespace) -> None:
    """Say where finished units of a failed build are."""
    from data_prep.scratch import holds_results, scratch_folder

    if args.command == "build" and holds_results(folder := scratch_folder(args.output)):
        print(
            f"note: finished units are kept in {folder}; the same command goes on from there.",
            file=sys.stderr,
        )


def _print_summary(payload: dict[str, Any], output: Path) -> None:
    rejects = payload["rejects"]["num_rejects"]
    print(
        f"{output}: {payload['num_rows']:,} rows of {payload['block_size']} tokens from"
        f" {payload['num_documents']:,} documents, {payload['num_text_bytes']:,} bytes of text;"
        f" {payload['packing']['dropped_tail_tokens']} tokens left over at the end;"
        f" {payload['row_shares']['cut_share']:.1%} of documents cut,"
        f" {payload['row_shares']['padding_share']:.2%} padding."
    )
    if "supervision" in payload:
        _print_supervision(payload)
    if payload["holdout"] is not None:
        print(f"held out: {payload['holdout']['num_documents_of_other_part']:,} documents.")
    if payload["dropped"]["num_dropped"]:
        reasons = payload["dropped"]["by_reason"].items()
        print("left out: " + ", ".join(f"{name} {count:,}" for name, count in reasons) + ".")
    if rejects:
        print(
            f"warning: {rejects} lines are no documents; see {output / 'rejects.jsonl'}.",
            file=sys.stderr,
        )


def _print_supervision(payload: dict[str, Any]) -> None:
    found = payload["supervision"]
    share = found["num_supervised_tokens"] / payload["num_tokens"]
    print(
        f"supervised: {found['num_supervised_tokens']:,} tokens ({share:.1%}) of"
        f" {found['num_answers']:,} answers."
    )
    long = found["long"]
    if long["num_long"]:
        print(
            f"longer than a row: {long['num_long']:,} conversations; {long['num_truncated']:,} lost"
            f" {long['num_turns_left_out']:,} turns at their ends, {long['num_dropped']:,} were"
            " left out."
        )
    if found["num_answers_without_end"]:
        print(
            f"warning: {found['num_answers_without_end']:,} answers have no end-of-turn marker in"
            " this chat template; a model that learns from them does not learn to stop.",
            file=sys.stderr,
        )

"""Commands about languages and vocabularies: options and printing, nothing heavy until they run."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from forgetscale.errors import ConfigError

FERTILITY_EXAMPLES = """examples:
  all languages of a MADLAD-400 copy, one tokenizer against another:
    python -m data_prep fertility --input MADLAD-400 --output fertility.html \\
        --tokenizer models/OLMo-2-1124-7B-Instruct models/olmo2-ne

  chosen files under names of your own:
    python -m data_prep fertility --input Nepali=data/ne.jsonl Amharic='data/am/*.jsonl.gz' \\
        --tokenizer models/OLMo-2-1124-7B-Instruct --output fertility.json

FILE.html is a page with plots, beside it FILE.json with the numbers (or --output FILE.json alone).
A word is a run of letters, marks and digits; scripts that do not part words (Thai, Chinese) have no
tokens a word worth reading, use tokens a byte."""

EXTEND_EXAMPLES = """examples:
  python -m data_prep extend-vocabulary --model models/OLMo-2-1124-7B-Instruct \\
      --input MADLAD-400/data/ne --num-pieces 8000 --output models/olmo2-ne

The output loads with AutoModelForCausalLM and AutoTokenizer. Rows of embedding and output head for
new entries are the mean of the rows that spelled them before; old rows are copied bit by bit.
manifest.json says from which id on entries are new (first_new_id). Build token sets with the new
folder as --tokenizer; data_prep fertility compares old and new."""


def add_fertility(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``fertility``."""
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        required=True,
        action="extend",
        metavar="[NAME=]PATH",
        help="files, folders or glob patterns, or the root of a MADLAD-400 copy for all languages",
    )
    add(
        "--tokenizer",
        nargs="+",
        required=True,
        type=Path,
        metavar="DIR",
        help="one or more folders AutoTokenizer loads",
    )
    add("--output", type=Path, required=True, metavar="FILE", help="FILE.html or FILE.json")
    parser.set_defaults(run=run_fertility)


def run_fertility(args: argparse.Namespace) -> int:
    """Measure, write the report, print the table.

    Raises:
        ConfigError: The output has another ending.
    """
    from data_prep.fertility import compare
    from data_prep.fertility_page import fertility_page, fertility_table
    from data_prep.page import write_text

    if args.output.suffix not in (".html", ".json"):
        raise ConfigError(f"--output must end in .html or .json, got {args.output}.")
    found = compare(args.input, args.tokenizer)
    if args.output.suffix == ".html":
        write_text(args.output, fertility_page(found))
    text = json.dumps(found, indent=1, ensure_ascii=False) + "\n"
    write_text(args.output.with_suffix(".json"), text)
    print(fertility_table(found))
    print(f"\nwritten: {args.output}")
    return 0


def add_extend(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``extend-vocabulary``."""
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="DIR", help="model folder with its tokenizer")
    add("--input", nargs="+", required=True, action="extend", metavar="PATH_OR_GLOB",
        help="target text, read as by build")  # fmt: skip
    add("--num-pieces", type=int, required=True, metavar="N", help="most new vocabulary entries")
    add("--output", type=Path, required=True, metavar="DIR", help="folder to make; must not exist")
    parser.set_defaults(run=run_extend)


def run_extend(args: argparse.Namespace) -> int:
    """Extend and say what was gained."""
    from data_prep.extend_vocabulary import extend_vocabulary

    payload = extend_vocabulary(args.model, args.input, args.num_pieces, args.output)
    gain = payload["fertility"]
    print(
        f"{args.output}: {payload['num_new_tokens']:,} new entries from id"
        f" {payload['first_new_id']:,} on ({gain['num_new_tokens_used']:,} occur in the text);"
        f" tokens a byte {gain['tokens_per_byte_before']:.3f} ->"
        f" {gain['tokens_per_byte_after']:.3f}."
    )
    return 0

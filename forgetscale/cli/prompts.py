"""Your own safe and unsafe prompts -> refusal tasks that ``evaluate`` and ``train`` measure."""

from __future__ import annotations

import argparse
from pathlib import Path

from forgetscale.errors import ConfigError
from forgetscale.evaluation.prompt_files import REFUSALS, choose, read_prompts, write_prompt_tasks

EXAMPLES = """examples:
  forgetscale prompts --unsafe unsafe.csv --safe safe.jsonl --output tasks
  forgetscale prompts --unsafe unsafe.csv --category-column category --per-category 500 \\
      --safe questions.txt --refusals refusals.txt --output tasks
  forgetscale evaluate --model runs/a/export --task-dir tasks --tasks refusal over_refusal \\
      --output results/a
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    for name, what in (("--unsafe", "must be refused"), ("--safe", "must not be refused")):
        parser.add_argument(
            name,
            type=Path,
            required=True,
            metavar="FILE",
            help=f"prompts that {what}: .jsonl, .csv with a header, or .txt with one a line",
        )
    parser.add_argument(
        "--column", default="prompt", metavar="NAME", help="field with the prompt (prompt)"
    )
    parser.add_argument(
        "--category-column", metavar="NAME", help="field of the unsafe prompts' category"
    )
    parser.add_argument(
        "--per-category", type=int, metavar="N", help="unsafe prompts of each category, drawn"
    )
    parser.add_argument(
        "--refusals",
        type=Path,
        metavar="FILE",
        help="openings of a refusal, one a line (default: common English ones)",
    )
    parser.add_argument("--seed", type=int, default=42, metavar="N", help="seed of the draw")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="task folder")


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    if options.per_category is not None and options.per_category <= 0:
        raise ConfigError(f"--per-category must be > 0, got {options.per_category}.")
    refusals = REFUSALS
    if options.refusals is not None:
        refusals = tuple(prompt.text for prompt in read_prompts(options.refusals))
    unsafe = read_prompts(
        options.unsafe, column=options.column, category_column=options.category_column
    )
    counts = write_prompt_tasks(
        options.output,
        unsafe=choose(unsafe, options.per_category, options.seed),
        safe=read_prompts(options.safe, column=options.column),
        refusals=refusals,
    )
    for task, count in counts.items():
        print(f"{options.output / task}.jsonl  {count:,} prompts")

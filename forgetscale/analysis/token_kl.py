"""How far apart source and tuned model are at the first token of an answer, or at all of them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from forgetscale.analysis.two_models import read_folders, read_place
from forgetscale.errors import ConfigError
from forgetscale.knowledge.token_kl import MEASURES, Comparison, compare_tokens, read_items

SUMMARY = "divergence of source and tuned model on their likeliest tokens; needs no recipe"


def add_arguments(parser: Any) -> None:
    """Add the options of this analysis."""
    add = parser.add_argument
    add("--prompts", type=Path, metavar="FILE",
        help="JSON lines: prompt, optional source_prompt, answer, group")  # fmt: skip
    add("--kl-top-k", type=int, default=10, metavar="K", help="tokens compared (default: 10)")
    add("--top-of", choices=("tuned", "source"), default="tuned",
        help="whose likeliest tokens (default: tuned)")  # fmt: skip
    add("--direction", choices=("tuned_from_source", "source_from_tuned"),
        default="tuned_from_source", help="KL(tuned || source), or its reverse")  # fmt: skip
    add("--answer-tokens", choices=("first", "all"), default="first",
        help="compare at the first token, or read the answer on and take all")  # fmt: skip
    add("--same-context", action="store_true",
        help="give both models the tuned model's prompt")  # fmt: skip
    add("--memory", choices=("auto", "stream", "resident"), default="auto",
        help="models whole, or one layer at a time (default: by free memory)")  # fmt: skip


def run(options: argparse.Namespace) -> None:
    """Write ``items.jsonl`` and ``token_kl.json``.

    Raises:
        ConfigError: An option is missing or out of range.
        DataError: Items or models cannot be used.
    """
    source, tuned = read_folders(options)
    if options.prompts is None or options.kl_top_k < 1:
        raise ConfigError("--token-kl needs --prompts FILE, and --kl-top-k >= 1.")
    comparison = Comparison(
        source,
        tuned,
        k=options.kl_top_k,
        direction=options.direction,
        top_of=options.top_of,
        all_tokens=options.answer_tokens == "all",
    )
    items = read_items(options.prompts, need_answers=comparison.all_tokens)
    if options.same_context:
        items = [item.in_one_context() for item in items]
    options.workers = options.workers or 1  # each holds both models, or a layer
    place = read_place(options)
    summary = compare_tokens(comparison, items, place, memory=options.memory, log=print)
    if place.rank == 0:
        for group, row in summary.items():
            numbers = ", ".join(f"{name} {row[name]['mean']:.6f}" for name in MEASURES)
            print(f"{group} ({row['items']} items): {numbers}")

"""How well a model knows facts: sampled continuations of openings, and groups 0 to 4."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from forgetscale.analysis.two_models import read_place
from forgetscale.errors import ConfigError
from forgetscale.knowledge.facts import (
    IN_DOMAIN,
    read_entity_questions,
    read_facts,
    read_templates,
)
from forgetscale.knowledge.mastery import Probe, probe_mastery

SUMMARY = "how well a model knows facts, from sampled continuations; needs no recipe"


def add_arguments(parser: Any) -> None:
    """Add the options of this analysis."""
    add = parser.add_argument
    add("--model", type=Path, metavar="DIR", help="model folder")
    add("--facts", type=Path, metavar="PATH",
        help="JSON lines (subject, relation, object, aliases) or ENTITYQUESTIONS")  # fmt: skip
    add("--split", default="test", help="split of ENTITYQUESTIONS (default: %(default)s)")
    add("--templates", type=Path, metavar="FILE",
        help='JSON of relation: ["The capital of [X] is", ...]')  # fmt: skip
    add("--samples", type=int, default=10, metavar="N", help="of each opening (default: 10)")
    add("--sample-tokens", type=int, default=32, metavar="N", help="longest (default: 32)")
    add("--temperature", type=float, default=0.7, help="of sampling (default: %(default)s)")
    add("--match", choices=("words", "substring"), default="words",
        help="whole words, or the paper's substring (default: words)")  # fmt: skip
    add("--match-case", action="store_true", help="case counts in answers")
    add("--in-domain", nargs="+", default=IN_DOMAIN, metavar="R",
        help="relations of the in-domain split (default: those about places)")  # fmt: skip
    add("--sample-seed", type=int, default=0, metavar="N", help="of sampling")
    add("--sample-batch", type=int, default=16, metavar="N",
        help="continuations written at once by a process (default: 16, at least 4)")  # fmt: skip
    add("--stop-newline", action="store_true", help="a line break ends a continuation")
    add("--rank-candidates", type=int, default=32, metavar="N",
        help="answers of the relation among which the right one is ranked; 0: none"
        " (default: 32)")  # fmt: skip


def run(options: argparse.Namespace) -> None:
    """Write ``facts.jsonl`` and ``mastery.json``.

    Raises:
        ConfigError: An option is missing or out of range.
        DataError: Facts, templates or the model cannot be used.
    """
    for name in ("model", "facts", "templates", "output"):
        if getattr(options, name) is None:
            raise ConfigError(f"--mastery needs --{name}.")
    numbers = (options.samples, options.sample_tokens, options.sample_batch)
    if min(numbers) < 1 or not options.temperature > 0:
        raise ConfigError(
            "--samples, --sample-tokens and --sample-batch must be >= 1 and --temperature > 0."
        )
    if options.rank_candidates < 0 or options.rank_candidates == 1:
        raise ConfigError(
            f"--rank-candidates {options.rank_candidates} must be 0 (no ranks) or >= 2."
        )
    if options.facts.is_dir():
        facts = read_entity_questions(options.facts, options.split)
    else:
        facts = read_facts(options.facts)
    templates = read_templates(options.templates, facts)
    probe = Probe(
        options.model,
        num_samples=options.samples,
        max_new_tokens=options.sample_tokens,
        temperature=options.temperature,
        rule=options.match,
        fold_case=not options.match_case,
        seed=options.sample_seed,
        batch_size=options.sample_batch,
        stop_newline=options.stop_newline,
        rank_candidates=options.rank_candidates,
    )
    options.workers = options.workers or 1  # each holds a whole model
    place = read_place(options)
    summary = probe_mastery(probe, facts, templates, place, options.in_domain)
    for name in ("all", "in_domain", "out_of_domain"):
        if name in summary:
            print(f"{name}: {_described(summary[name])}")


def _described(found: Mapping[str, Any]) -> str:
    """Return the main numbers of a set of facts in a line."""
    text = (
        f"groups {found['groups']}, hit rate {found['micro']:.4f} over facts,"
        f" {found['macro']:.4f} over relations; in the format of an answer"
        f" {found['format_following']['micro']:.4f} of continuations"
    )
    if "ranks" in found:
        ranks = found["ranks"]
        text += (
            f"; the answer's median rank {ranks['answer_ranks']['median']:g} of"
            f" {ranks['mean_candidates']:.1f}, its first token's"
            f" {ranks['first_token_ranks']['median']:g} in the vocabulary"
        )
    return text

"""The numbers of the report: ``report.json``, from which the page is drawn and nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from forgetscale.evaluation.degradation import is_target, relative_degradation
from forgetscale.evaluation.report.claim import ClaimOutcome, judge
from forgetscale.evaluation.report.matched import (
    RULE,
    Level,
    matched_levels,
    run_points,
    value_at,
)
from forgetscale.evaluation.report.runs import RECALL, TARGET, Run
from forgetscale.evaluation.report.seeds import SeedMean, paired_difference, seed_mean

CONTROL = "sft"
_MIDDLE = 1
_MAX_LOSSES = 300


@dataclass(frozen=True, slots=True)
class Matched:
    """All runs at the same target perplexities.

    Attributes:
        levels: The points, from mild to deep; empty if there are none.
        why_none: Why not, in words.
        recalls: Method -> seed -> recall at each level.
        losses: Method -> seed -> recall before adaptation minus recall at each level.
    """

    levels: list[Level]
    why_none: str
    recalls: dict[str, dict[int, list[float | None]]]
    losses: dict[str, dict[int, list[float | None]]]


def match_runs(runs: Sequence[Run]) -> Matched:
    """Read every run's recall at the matched target perplexities."""
    levels, why_none = matched_levels(runs)
    recalls: dict[str, dict[int, list[float | None]]] = {}
    losses: dict[str, dict[int, list[float | None]]] = {}
    for run in runs:
        points = run_points(run)
        here = [value_at(points, level.target_perplexity) for level in levels]
        source = source_recall(run)
        recalls.setdefault(run.method, {})[run.seed] = here
        losses.setdefault(run.method, {})[run.seed] = [
            None if value is None or source is None else source - value for value in here
        ]
    return Matched(levels, why_none, recalls, losses)


def source_recall(run: Run) -> float | None:
    """Return recall before adaptation: at step 0 of the curve, else of the source model."""
    if run.curve and run.curve[0].step == 0 and RECALL in run.curve[0].values:
        return run.curve[0].values[RECALL]
    return run.before[RECALL].value if RECALL in run.before else None


def report_data(
    runs: Sequence[Run], title: str, provenance: Mapping[str, Any]
) -> tuple[dict[str, Any], Matched, ClaimOutcome]:
    """Return the content of ``report.json`` with what the page needs beside it.

    Args:
        runs: Run folders as read.
        title: Heading of the report.
        provenance: What made the report.
    """
    matched = match_runs(runs)
    claim = judge(matched.levels, matched.losses, matched.why_none)
    methods = list(dict.fromkeys(run.method for run in runs))
    data = {
        "title": title,
        "runs": [_run_json(run, matched) for run in runs],
        "summary": [_method_json(method, runs, matched) for method in methods],
        "claim": claim.to_json(),
        "matched_rule": RULE,
        "matched_levels": [
            {"name": level.name, "target_perplexity": level.target_perplexity}
            for level in matched.levels
        ],
        "matched_missing": matched.why_none,
        "provenance": dict(provenance),
    }
    return data, matched, claim


def ability_entry(run: Run, name: str) -> dict[str, Any] | None:
    """Return an ability before and after, with n and the interval of ``after``; None if unknown."""
    if name not in run.before or name not in run.after:
        return None
    before, after = run.before[name], run.after[name]
    return {
        "before": before.value,
        "after": after.value,
        "n": after.n,
        "low": after.low,
        "high": after.high,
        "before_low": before.low,
        "before_high": before.high,
        "metric": after.metric,
        "higher_is_better": after.higher_is_better,
        "side": "target" if is_target(name) else "source",
    }


def abilities_of(runs: Sequence[Run]) -> list[str]:
    """Return every ability some run has before and after: source first, then target."""
    names = dict.fromkeys(name for run in runs for name in run.before if name in run.after)
    return sorted(names, key=lambda name: (is_target(name), "/" in name))


def _run_json(run: Run, matched: Matched) -> dict[str, Any]:
    average, changes = relative_degradation(run.before, run.after)
    recalls = matched.recalls[run.method][run.seed]
    losses = matched.losses[run.method][run.seed]
    points = [
        {
            "name": level.name,
            "target_perplexity": level.target_perplexity,
            "recall": recall,
            "recall_loss": loss,
        }
        for level, recall, loss in zip(matched.levels, recalls, losses, strict=True)
    ]
    middle = points[_MIDDLE] if points else {"target_perplexity": None, "recall": None}
    stride = max(1, math.ceil(len(run.losses) / _MAX_LOSSES))
    entries = {name: ability_entry(run, name) for name in abilities_of([run])}
    return {
        "method": run.method,
        "seed": run.seed,
        "abilities": {name: entry for name, entry in entries.items() if name != TARGET},
        "target": entries.get(TARGET),
        "matched": {
            "target_perplexity": middle["target_perplexity"],
            "recall": middle["recall"],
        },
        "step_seconds": run.step_seconds,
        "folder": run.folder,
        "matched_points": points,
        "relative_degradation": {"average": average, "abilities": changes},
        "curve": [
            {"step": p.step, "target_tokens": p.target_tokens, "values": dict(p.values)}
            for p in run.curve
        ],
        "losses": [list(row) for row in run.losses[::stride]],
        "settings": settings_of(run),
        "versions": dict(run.versions),
        "notes": list(run.notes),
    }


def settings_of(run: Run) -> dict[str, Any]:
    """Return the recipe values that tell runs apart."""
    chosen = {}
    for path in ("model.path", "method.frozen_fraction", "optim.lr", "train.global_batch_size"):
        section, _, key = path.partition(".")
        value = (run.recipe.get(section) or {}).get(key)
        if value is not None:
            chosen[path] = str(value).rpartition("/")[2] if key == "path" else value
    if run.losses:
        chosen["steps"] = run.losses[-1][0]
    return chosen


def _method_json(method: str, runs: Sequence[Run], matched: Matched) -> dict[str, Any]:
    own = [run for run in runs if run.method == method]
    seconds = [run.step_seconds for run in own if run.step_seconds is not None]
    averages = [relative_degradation(run.before, run.after)[0] for run in own]
    return {
        "method": method,
        "seeds": [run.seed for run in own],
        "abilities": {
            name: _ability_over_seeds(name, own) for name in abilities_of(own) if name != TARGET
        },
        "target": _ability_over_seeds(TARGET, own) if TARGET in abilities_of(own) else None,
        "matched_points": _points_over_seeds(method, matched),
        "relative_degradation": _json(
            seed_mean([average for average in averages if average is not None])
        ),
        "step_seconds": sum(seconds) / len(seconds) if seconds else None,
    }


def _ability_over_seeds(name: str, own: Sequence[Run]) -> dict[str, Any]:
    entries = [entry for run in own if (entry := ability_entry(run, name)) is not None]
    after = seed_mean([entry["after"] for entry in entries])
    before = seed_mean([entry["before"] for entry in entries])
    assert after is not None and before is not None
    single = entries[0] if len(entries) == 1 else None
    return {
        "before": before.mean,
        "after": after.mean,
        "n": sum(entry["n"] for entry in entries),
        "low": single["low"] if single else after.low,
        "high": single["high"] if single else after.high,
        "before_low": single["before_low"] if single else before.low,
        "before_high": single["before_high"] if single else before.high,
        "interval": "bootstrap over samples" if single else "t over seeds",
        "metric": entries[0]["metric"],
        "higher_is_better": entries[0]["higher_is_better"],
        "side": entries[0]["side"],
        "num_seeds": len(entries),
    }


def _points_over_seeds(method: str, matched: Matched) -> list[dict[str, Any]]:
    points = []
    for index, level in enumerate(matched.levels):
        losses = _at(matched.losses, method, index)
        control = _at(matched.losses, CONTROL, index)
        points.append(
            {
                "name": level.name,
                "target_perplexity": level.target_perplexity,
                "recall": _json(seed_mean(list(_at(matched.recalls, method, index).values()))),
                "recall_loss": _json(seed_mean(list(losses.values()))),
                "recall_loss_minus_sft": None
                if method == CONTROL
                else _json(paired_difference(losses, control)),
            }
        )
    return points


def _at(
    values: Mapping[str, Mapping[int, Sequence[float | None]]], method: str, index: int
) -> dict[int, float]:
    """Return seed -> value of a method at one level, where there is one."""
    return {
        seed: value
        for seed, row in values.get(method, {}).items()
        if (value := row[index]) is not None
    }


def _json(mean: SeedMean | None) -> dict[str, float | int | None] | None:
    return None if mean is None else mean.to_json()

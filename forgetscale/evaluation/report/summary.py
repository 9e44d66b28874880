"""The numbers of the report: ``report.json``, from which the page is drawn and nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from forgetscale.evaluation.degradation import is_target, relative_degradation
from forgetscale.evaluation.report.claim import Claim, ClaimOutcome, choose_claim, judge
from forgetscale.evaluation.report.matched import (
    RULE,
    Level,
    idle_methods,
    matched_levels,
    run_points,
    value_at,
)
from forgetscale.evaluation.report.mixing import mixing_data
from forgetscale.evaluation.report.runs import TARGET, Run
from forgetscale.evaluation.report.safety import drift_data, forgetting_data
from forgetscale.evaluation.report.seeds import SeedMean, paired_difference, seed_mean
from forgetscale.evaluation.report.text_style import style_data

_MIDDLE = 1
_MAX_LOSSES = 300


Values = Mapping[str, Mapping[int, Sequence[float | None]]]
"""Method -> seed -> value at each level."""


@dataclass(frozen=True, slots=True)
class Matched:
    """All runs at the same target perplexities.

    Attributes:
        claim: What the study set out to show; its ability is the one compared.
        levels: The points, from mild to deep; empty if there are none.
        why_none: Why not, in words.
        kept: The ability at each level.
        lost: The ability before adaptation minus the ability at each level.
        others: Further abilities that were measured during training, at each level.
        idle: Methods that did not learn the target and are not compared.
    """

    claim: Claim
    levels: list[Level]
    why_none: str
    kept: Values
    lost: Values
    others: Mapping[str, Values]
    idle: Sequence[str]


def match_runs(runs: Sequence[Run], claim: Claim) -> Matched:
    """Read every run's abilities at the matched target perplexities."""
    idle = idle_methods(runs, claim.control, claim.ability)
    learned = [run for run in runs if run.method not in idle]
    levels, why_none = matched_levels(learned, claim.ability)

    def read(ability: str) -> Values:
        values: dict[str, dict[int, list[float | None]]] = {}
        for run in runs:
            points = run_points(run, ability)
            here = [value_at(points, level.target_perplexity) for level in levels]
            values.setdefault(run.method, {})[run.seed] = here
        return values

    kept = read(claim.ability)
    before = {(run.method, run.seed): before_training(run, claim.ability) for run in runs}
    lost = {
        method: {
            seed: [
                None if value is None or (start := before[method, seed]) is None else start - value
                for value in row
            ]
            for seed, row in seeds.items()
        }
        for method, seeds in kept.items()
    }
    measured = dict.fromkeys(name for run in runs for point in run.curve for name in point.values)
    others = {
        name: read(name)
        for name in measured
        if name not in (claim.ability, TARGET) and not name.startswith("bits_per_byte/")
    }
    return Matched(claim, levels, why_none, kept, lost, others, idle)


def before_training(run: Run, ability: str) -> float | None:
    """Return an ability before adaptation: at step 0 of the curve, else of the source model."""
    if run.curve and run.curve[0].step == 0 and ability in run.curve[0].values:
        return run.curve[0].values[ability]
    return run.before[ability].value if ability in run.before else None


def report_data(
    runs: Sequence[Run], title: str, provenance: Mapping[str, Any]
) -> tuple[dict[str, Any], Matched, ClaimOutcome]:
    """Return the content of ``report.json`` with what the page needs beside it.

    Args:
        runs: Run folders as read.
        title: Heading of the report.
        provenance: What made the report.
    """
    matched = match_runs(runs, choose_claim({run.method for run in runs}))
    claim = judge(matched.claim, matched.levels, matched.lost, matched.why_none)
    methods = list(dict.fromkeys(run.method for run in runs))
    data = {
        "title": title,
        "runs": [_run_json(run, matched) for run in runs],
        "summary": [_method_json(method, runs, matched) for method in methods],
        "claim": claim.to_json(),
        "matched_ability": matched.claim.ability,
        "control": matched.claim.control,
        "matched_rule": RULE,
        "matched_levels": [
            {"name": level.name, "target_perplexity": level.target_perplexity}
            for level in matched.levels
        ],
        "matched_missing": matched.why_none,
        "matched_idle": list(matched.idle),
        "matched_others": {
            name: {method: _means(values, method, len(matched.levels)) for method in methods}
            for name, values in matched.others.items()
        },
        "mixing": mixing_data(runs, matched.levels, matched.kept, matched.claim.control),
        "style": style_data(runs),
        "drift": drift_data(runs),
        "forgetting_law": forgetting_data(runs),
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
    kept = matched.kept[run.method][run.seed]
    lost = matched.lost[run.method][run.seed]
    points = [
        {
            "name": level.name,
            "target_perplexity": level.target_perplexity,
            "kept": value,
            "lost": loss,
        }
        for level, value, loss in zip(matched.levels, kept, lost, strict=True)
    ]
    middle = points[_MIDDLE] if points else {"target_perplexity": None, "kept": None}
    stride = max(1, math.ceil(len(run.losses) / _MAX_LOSSES))
    entries = {name: ability_entry(run, name) for name in abilities_of([run])}
    return {
        "method": run.method,
        "seed": run.seed,
        "abilities": {name: entry for name, entry in entries.items() if name != TARGET},
        "target": entries.get(TARGET),
        "matched": {
            "target_perplexity": middle["target_perplexity"],
            matched.claim.ability: middle["kept"],
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
        lost = _at(matched.lost, method, index)
        control = _at(matched.lost, matched.claim.control, index)
        points.append(
            {
                "name": level.name,
                "target_perplexity": level.target_perplexity,
                "kept": _json(seed_mean(list(_at(matched.kept, method, index).values()))),
                "lost": _json(seed_mean(list(lost.values()))),
                "lost_minus_control": None
                if method == matched.claim.control
                else _json(paired_difference(lost, control)),
            }
        )
    return points


def _means(values: Values, method: str, num_levels: int) -> list[dict[str, Any] | None]:
    """Return a method's mean over seeds at each level."""
    return [
        _json(seed_mean(list(_at(values, method, index).values()))) for index in range(num_levels)
    ]


def _at(values: Values, method: str, index: int) -> dict[int, float]:
    """Return seed -> value of a method at one level, where there is one."""
    return {
        seed: value
        for seed, row in values.get(method, {}).items()
        if (value := row[index]) is not None
    }


def _json(mean: SeedMean | None) -> dict[str, float | int | None] | None:
    return None if mean is None else mean.to_json()

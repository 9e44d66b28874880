"""Comparing runs at equal target score: levels by a fixed rule, abilities read off each curve.

A method that learns less also forgets less, so runs are compared where they know the target
language equally well, not where they happen to end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from forgetscale.evaluation.report.runs import RECALL, TARGET, Run

LEVELS = (("mild", 2.0, 1 / 3), ("middle", 1.25, 2 / 3), ("deep", 1.0, 1.0))
"""Name, factor over the deepest common perplexity, and share of a range too short for factors."""
RULE = (
    "Deep is the lowest target perplexity that every run reached; middle and mild are 1.25 and 2"
    " times that. Where the runs' common range (from the lowest perplexity any run had at its first"
    " evaluation after the start) is shorter than a factor of 2, mild and middle stand at 1/3 and"
    " 2/3 of it in log perplexity. The rule looks at all runs alike and at target perplexity alone,"
    " so it cannot favour a method, and every point lies after adaptation began and within what"
    " every run measured. A run's score there is read off its own curve: evaluations that set a"
    " new lowest target perplexity, joined linearly in log perplexity. A method of which some run"
    " never went below the perplexity that the control's runs had at their first evaluation did not"
    " learn the target; it is named and left out of the rule."
)


@dataclass(frozen=True, slots=True)
class Level:
    """A matched target perplexity."""

    name: str
    target_perplexity: float


def envelope(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points at which perplexity falls below all before it.

    Args:
        points: Target perplexity and ability in order of steps.

    Returns:
        Those that set a new lowest perplexity: a curve that can be read at one place only. What
        happens while perplexity rises again belongs to no level.
    """
    kept: list[tuple[float, float]] = []
    for perplexity, recall in points:
        if not kept or perplexity < kept[-1][0]:
            kept.append((perplexity, recall))
    return kept


def value_at(points: Sequence[tuple[float, float]], perplexity: float) -> float | None:
    """Read a curve at ``perplexity``, linearly in log perplexity; never beyond its ends.

    Args:
        points: Target perplexity and value in order of steps.
        perplexity: Where to read, > 0.

    Returns:
        The value when the run first reached this perplexity, or None outside its range.
    """
    curve = envelope(points)
    for index, (here, value) in enumerate(curve):
        if here == perplexity:
            return value
        if index and here < perplexity < curve[index - 1][0]:
            above, before = curve[index - 1]
            share = math.log(above / perplexity) / math.log(above / here)
            return before + share * (value - before)
    return None


def _measured(run: Run, ability: str) -> list[float]:
    """Return target perplexities of a run after its start, where ``ability`` was measured too."""
    return [
        point.values[TARGET]
        for point in run.curve
        if point.step > 0 and TARGET in point.values and ability in point.values
    ]


def idle_methods(runs: Sequence[Run], control: str, ability: str = RECALL) -> list[str]:
    """Return the methods that did not learn the target, as the rule says.

    Args:
        runs: All runs of the report.
        control: Unprotected method.
        ability: What is compared.
    """
    firsts = [
        found[0] for run in runs if run.method == control and (found := _measured(run, ability))
    ]
    if not firsts:
        return []
    limit = min(firsts)
    return list(
        dict.fromkeys(
            run.method
            for run in runs
            if run.method != control and (found := _measured(run, ability)) and min(found) >= limit
        )
    )


def run_points(run: Run, ability: str = RECALL) -> list[tuple[float, float]]:
    """Return target perplexity and ``ability`` of a run's curve, where both were measured."""
    return [
        (point.values[TARGET], point.values[ability])
        for point in run.curve
        if TARGET in point.values and ability in point.values
    ]


def matched_levels(runs: Sequence[Run], ability: str = RECALL) -> tuple[list[Level], str]:
    """Choose the three target perplexities at which runs are compared.

    Args:
        runs: All runs of the report.
        ability: What is compared.

    Returns:
        The levels from mild to deep, or none with a sentence that says why.
    """
    starts, ends = [], []
    for run in runs:
        after_start = _measured(run, ability)
        if len(after_start) < 2:
            return [], (
                f"run {run.folder} has {len(after_start)} evaluations of {TARGET} and {ability}"
                " during training; matched points need at least 2 of every run"
            )
        starts.append(after_start[0])
        ends.append(min(after_start))
    upper, lower = min(starts), max(ends)
    if not upper > lower:
        return [], (
            f"the runs share no range of target perplexity: one began at {upper:.4g}, another"
            f" never came below {lower:.4g}; train longer or evaluate earlier"
        )
    enough = upper >= lower * max(factor for _, factor, _ in LEVELS)
    return [
        Level(name, lower * factor if enough or share == 1.0 else upper * (lower / upper) ** share)
        for name, factor, share in LEVELS
    ], ""

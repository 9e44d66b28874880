"""The testbed claim, decided by code from the numbers, whatever comes out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from forgetscale.evaluation.report.matched import Level
from forgetscale.evaluation.report.seeds import seed_mean

SUBJECT, CONTROL, RANDOM = "ssu/paper", "sft", "ssu/rand"
MIN_SEEDS = 3
NEEDED_REDUCTION = 0.25
CLAIM = (
    f"At every matched target perplexity the mean recall loss of {SUBJECT} is at least"
    f" {NEEDED_REDUCTION:.0%} below that of {CONTROL}, and below that of {RANDOM}"
    f" (at least {MIN_SEEDS} seeds)."
)

Losses = Mapping[str, Mapping[int, Sequence[float | None]]]
"""Method -> seed -> recall loss at each level (None where the curve does not reach)."""


@dataclass(frozen=True, slots=True)
class ClaimOutcome:
    """Whether the claim held.

    Attributes:
        status: ``held``, ``not held`` or ``not tested``.
        sentence: The outcome in words, with the numbers or what is missing.
        points: Per level: the means compared and both verdicts.
    """

    status: str
    sentence: str
    points: tuple[dict[str, Any], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the outcome as a JSON object."""
        return {
            "claim": CLAIM,
            "status": self.status,
            "sentence": self.sentence,
            "points": list(self.points),
        }


def judge(levels: Sequence[Level], losses: Losses, why_no_levels: str = "") -> ClaimOutcome:
    """Decide the claim.

    Only seeds that all three methods have are used, so that each comparison is on the same
    worlds and data orders.

    Args:
        levels: Matched target perplexities.
        losses: Recall before adaptation minus recall at each level.
        why_no_levels: What to say if there are no levels.
    """
    absent = [name for name in (SUBJECT, CONTROL, RANDOM) if name not in losses]
    if absent:
        return ClaimOutcome("not tested", f"Not tested: no run of {' and '.join(absent)}.")
    if not levels:
        return ClaimOutcome("not tested", f"Not tested: {why_no_levels}.")
    seeds = sorted(
        seed
        for seed in losses[SUBJECT]
        if all(
            seed in losses[name] and None not in losses[name][seed]
            for name in (SUBJECT, CONTROL, RANDOM)
        )
    )
    if len(seeds) < MIN_SEEDS:
        return ClaimOutcome(
            "not tested",
            f"Not tested: needs at least {MIN_SEEDS} seeds of {SUBJECT}, {CONTROL} and {RANDOM},"
            f" got {len(seeds)}.",
        )
    points = tuple(_judge_level(level, index, losses, seeds) for index, level in enumerate(levels))
    failed = [point for point in points if not (point["below_control"] and point["below_random"])]
    if not failed:
        least = min(point["reduction"] for point in points)
        sentence = (
            f"Held over {len(seeds)} seeds: {SUBJECT} loses at least {least:.0%} less recall than"
            f" {CONTROL} at every matched point, and less than {RANDOM}."
        )
        return ClaimOutcome("held", sentence + _doubt(points), points)
    parts = [_why(point) for point in failed]
    sentence = f"Not held over {len(seeds)} seeds: {'; '.join(parts)}."
    return ClaimOutcome("not held", sentence + _doubt(points), points)


def _doubt(points: Sequence[Mapping[str, Any]]) -> str:
    """Say where the means alone decide, because the paired interval over seeds includes 0."""
    parts = []
    for name in (CONTROL, RANDOM):
        open_points = [
            point["name"]
            for point in points
            if point["difference"][name]["low"] <= 0 <= point["difference"][name]["high"]
        ]
        if open_points:
            parts.append(f"{name} at {', '.join(open_points)}")
    if not parts:
        return " Every paired 95% interval excludes 0."
    return (
        " The claim compares means; the paired 95% interval of the difference over these seeds"
        f" includes 0 against {' and against '.join(parts)}: more seeds would be needed to be sure."
    )


def _judge_level(level: Level, index: int, losses: Losses, seeds: Sequence[int]) -> dict[str, Any]:
    def values(method: str) -> list[float]:
        found = [losses[method][seed][index] for seed in seeds]
        return [value for value in found if value is not None]

    def mean(method: str) -> float:
        return fmean(values(method))

    def difference(method: str) -> dict[str, float | int | None]:
        pairs = zip(values(SUBJECT), values(method), strict=True)
        paired = seed_mean([ours - theirs for ours, theirs in pairs])
        assert paired is not None
        return paired.to_json()

    subject, control, random = mean(SUBJECT), mean(CONTROL), mean(RANDOM)
    reduction = 1.0 - subject / control if control > 0 else None
    return {
        "name": level.name,
        "target_perplexity": level.target_perplexity,
        "recall_loss": {SUBJECT: subject, CONTROL: control, RANDOM: random},
        "difference": {name: difference(name) for name in (CONTROL, RANDOM)},
        "reduction": reduction,
        "below_control": reduction is not None and reduction >= NEEDED_REDUCTION,
        "below_random": subject < random,
        "num_seeds": len(seeds),
    }


def _why(point: Mapping[str, Any]) -> str:
    where = f"at {point['name']} (perplexity {point['target_perplexity']:.3g})"
    loss = point["recall_loss"]
    reasons = []
    if point["reduction"] is None:
        reasons.append(f"{CONTROL} lost no recall ({loss[CONTROL]:.3f}), so nothing can be saved")
    elif not point["below_control"]:
        reasons.append(
            f"the loss of {SUBJECT} ({loss[SUBJECT]:.3f}) is {point['reduction']:.0%} below"
            f" {CONTROL} ({loss[CONTROL]:.3f}), {NEEDED_REDUCTION:.0%} needed"
        )
    if not point["below_random"]:
        reasons.append(
            f"the loss of {SUBJECT} ({loss[SUBJECT]:.3f}) is not below {RANDOM}"
            f" ({loss[RANDOM]:.3f})"
        )
    return f"{where} {' and '.join(reasons)}"

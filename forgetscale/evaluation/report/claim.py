"""The testbed claim, decided by code from the numbers, whatever comes out."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from forgetscale.evaluation.report.matched import Level
from forgetscale.evaluation.report.runs import RECALL
from forgetscale.evaluation.report.seeds import seed_mean
from forgetscale.evaluation.report.words import ability_label

MIN_SEEDS = 3


@dataclass(frozen=True, slots=True)
class Claim:
    """What a study set out to show: one method loses less than its controls.

    Attributes:
        subject: The method the claim is about.
        control: The unprotected method.
        others: Further controls, whose loss must be larger than the subject's.
        reduction: How far the subject's mean loss must lie below the control's, in [0, 1).
        ability: What is kept or lost.
    """

    subject: str
    control: str
    others: tuple[str, ...]
    reduction: float
    ability: str = RECALL

    @property
    def methods(self) -> tuple[str, ...]:
        """All methods that are compared."""
        return (self.subject, self.control, *self.others)

    @property
    def text(self) -> str:
        """The claim in words."""
        below = f"at least {self.reduction:.0%} below" if self.reduction else "below"
        others = f", and below that of {' and of '.join(self.others)}" if self.others else ""
        return (
            f"At every matched target perplexity the mean loss of {ability_label(self.ability)}"
            f" of {self.subject} is {below} that of {self.control}{others}"
            f" (at least {MIN_SEEDS} seeds)."
        )


CLAIMS = (
    Claim("ssu/paper", "sft", ("ssu/rand",), 0.25),
    Claim("eaft", "sft", ("sft/equal-gate", "sft/random-gate"), 0.0),
    Claim("alignguard_lora", "lora", ("l2_sp_lora", "ewc_lora"), 0.5, "refused"),
    Claim("selfdialogue/hard@0.5", "sft", ("freeze_layers", "external@0.5"), 0.0),
)
"""One for each study of the testbed; fixed before its runs."""


def choose_claim(methods: Collection[str]) -> Claim:
    """Return the claim that most of ``methods`` speak of; the first of all if none does."""
    return max(CLAIMS, key=lambda claim: len(set(claim.methods) & set(methods)))


Losses = Mapping[str, Mapping[int, Sequence[float | None]]]
"""Method -> seed -> loss of the ability at each level (None where the curve does not reach)."""


@dataclass(frozen=True, slots=True)
class ClaimOutcome:
    """Whether the claim held.

    Attributes:
        claim: What was claimed.
        status: ``held``, ``not held`` or ``not tested``.
        sentence: The outcome in words, with the numbers or what is missing.
        points: Per level: the means compared and both verdicts.
    """

    claim: Claim
    status: str
    sentence: str
    points: tuple[dict[str, Any], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the outcome as a JSON object."""
        return {
            "claim": self.claim.text,
            "ability": self.claim.ability,
            "subject": self.claim.subject,
            "control": self.claim.control,
            "others": list(self.claim.others),
            "status": self.status,
            "sentence": self.sentence,
            "points": list(self.points),
        }


def judge(
    claim: Claim, levels: Sequence[Level], losses: Losses, why_no_levels: str = ""
) -> ClaimOutcome:
    """Decide a claim.

    Only seeds that all its methods have are used, so that each comparison is on the same worlds
    and data orders.

    Args:
        claim: What is claimed.
        levels: Matched target perplexities.
        losses: The ability before adaptation minus the ability at each level.
        why_no_levels: What to say if there are no levels.
    """
    names = claim.methods
    absent = [name for name in names if name not in losses]
    if absent:
        return ClaimOutcome(claim, "not tested", f"Not tested: no run of {' and '.join(absent)}.")
    if not levels:
        return ClaimOutcome(claim, "not tested", f"Not tested: {why_no_levels}.")
    seeds = sorted(
        seed
        for seed in losses[claim.subject]
        if all(seed in losses[name] and None not in losses[name][seed] for name in names)
    )
    if len(seeds) < MIN_SEEDS:
        listed = f"{', '.join(names[:-1])} and {names[-1]}"
        return ClaimOutcome(
            claim,
            "not tested",
            f"Not tested: needs at least {MIN_SEEDS} seeds of {listed}, got {len(seeds)}.",
        )
    points = tuple(
        _judge_level(claim, level, index, losses, seeds) for index, level in enumerate(levels)
    )
    what = ability_label(claim.ability)
    failed = [point for point in points if not _holds(point)]
    if not failed:
        least = min(point["reduction"] for point in points)
        others = f", and less than {' and '.join(claim.others)}" if claim.others else ""
        sentence = (
            f"Held over {len(seeds)} seeds: {claim.subject} loses at least {least:.0%} less {what}"
            f" than {claim.control} at every matched point{others}."
        )
        return ClaimOutcome(claim, "held", sentence + _doubt(claim, points), points)
    parts = [_why(claim, point) for point in failed]
    sentence = f"Not held over {len(seeds)} seeds: {'; '.join(parts)}."
    return ClaimOutcome(claim, "not held", sentence + _doubt(claim, points), points)


def _holds(point: Mapping[str, Any]) -> bool:
    return bool(point["below_control"]) and all(point["below_others"].values())


def _doubt(claim: Claim, points: Sequence[Mapping[str, Any]]) -> str:
    """Say where the means alone decide, because the paired interval over seeds includes 0."""
    parts = []
    for name in claim.methods[1:]:
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


def _judge_level(
    claim: Claim, level: Level, index: int, losses: Losses, seeds: Sequence[int]
) -> dict[str, Any]:
    def values(method: str) -> list[float]:
        found = [losses[method][seed][index] for seed in seeds]
        return [value for value in found if value is not None]

    def difference(method: str) -> dict[str, float | int | None]:
        pairs = zip(values(claim.subject), values(method), strict=True)
        paired = seed_mean([ours - theirs for ours, theirs in pairs])
        assert paired is not None
        return paired.to_json()

    mean = {name: fmean(values(name)) for name in claim.methods}
    subject, control = mean[claim.subject], mean[claim.control]
    reduction = 1.0 - subject / control if control > 0 else None
    enough = reduction is not None and (
        reduction >= claim.reduction if claim.reduction else reduction > 0
    )
    return {
        "name": level.name,
        "target_perplexity": level.target_perplexity,
        "lost": mean,
        "difference": {name: difference(name) for name in claim.methods[1:]},
        "reduction": reduction,
        "below_control": enough,
        "below_others": {name: subject < mean[name] for name in claim.others},
        "num_seeds": len(seeds),
    }


def _why(claim: Claim, point: Mapping[str, Any]) -> str:
    where = f"at {point['name']} (perplexity {point['target_perplexity']:.3g})"
    lost, control, subject = point["lost"], claim.control, claim.subject
    reasons = []
    if point["reduction"] is None:
        reasons.append(
            f"{control} lost no {ability_label(claim.ability)} ({lost[control]:.3f}), so nothing"
            " can be saved"
        )
    elif not point["below_control"]:
        needed = f", {claim.reduction:.0%} needed" if claim.reduction else ""
        reasons.append(
            f"the loss of {subject} ({lost[subject]:.3f}) is {abs(point['reduction']):.0%}"
            f" {'below' if point['reduction'] >= 0 else 'above'} {control} ({lost[control]:.3f})"
            f"{needed}"
        )
    reasons += [
        f"the loss of {subject} ({lost[subject]:.3f}) is not below {name} ({lost[name]:.3f})"
        for name, below in point["below_others"].items()
        if not below
    ]
    return f"{where} {' and '.join(reasons)}"

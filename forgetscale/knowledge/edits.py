"""The family of edits in one notation, from restoration to model merging.

With d = tuned - source, every edit is ``source`` where an element is dropped, else
``source + lambda * c * d`` (the tuned bits themselves where lambda = c = 1). Methods differ in what
they drop, in ``c`` (rescaling) and in how several tuned models are put together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Any, Literal

from forgetscale.errors import ConfigError
from forgetscale.masks.radix import Side

Score = Literal["relative", "absolute", "base", "random", "fisher"]
Scope = Literal["global", "tensor", "layer", "module"]
Rescale = Literal["none", "inverse", "l1", "l2"]
Method = Literal["restore", "dare", "ties", "breadcrumbs", "della", "wise-ft", "task-arithmetic"]
SCORES: tuple[Score, ...] = ("relative", "absolute", "base", "random", "fisher")
SCOPES: tuple[Scope, ...] = ("global", "tensor", "layer", "module")
RESCALES: tuple[Rescale, ...] = ("none", "inverse", "l1", "l2")
METHODS: tuple[Method, ...] = (
    "restore",
    "dare",
    "ties",
    "breadcrumbs",
    "della",
    "wise-ft",
    "task-arithmetic",
)
WITHOUT_FRACTION = ("wise-ft", "task-arithmetic")


@dataclass(frozen=True, slots=True)
class Ranking:
    """An order of all edited elements of one tuned model."""

    score: Score
    scope: Scope
    model: int
    """Which tuned model, 0 for the first."""
    seed: int
    """Of ``random``; 0 for the others."""
    eps: float
    narrow: bool
    """Compute the score in bf16, as the official code does."""


@dataclass(frozen=True, slots=True)
class Cut:
    """The first elements of a ranking from one side: how many of a group of n.

    The count is ``floor(share * n)``, and where ``rest`` is set
    ``floor(share * n) + n - floor(rest * n)``.
    """

    ranking: int
    side: Side
    share: Fraction
    rest: Fraction | None = None

    def count(self, size: int) -> int:
        """Return the number of elements taken of a group of ``size``."""
        first = math.floor(self.share * size)
        if self.rest is None:
            return first
        return min(size, first + size - math.floor(self.rest * size))


@dataclass(frozen=True, slots=True)
class Drop:
    """What one tuned model loses.

    ``none``: nothing. ``cut``: what the cut takes. ``outside``: all but what the cut takes.
    ``outside_band``: what the first cut takes, and what the second does not. ``draw``: each element
    with probability ``rate``. ``draw_ranked``: each with a probability that falls linearly with the
    rank of its change within its row, from ``rate + spread`` to ``rate - spread``.
    """

    kind: Literal["none", "cut", "outside", "outside_band", "draw", "draw_ranked"]
    cuts: tuple[int, ...] = ()
    rate: Fraction = Fraction(0)
    spread: Fraction = Fraction(0)
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Variant:
    """One model to be written."""

    name: str
    drops: tuple[Drop, ...]
    """Per tuned model."""
    weights: tuple[float, ...]
    """Lambda times the weight of each tuned model."""
    rescale: Rescale = "none"
    dropped: Fraction = Fraction(0)
    """Share that is dropped, for ``inverse`` rescaling."""
    elect: bool = False
    """Keep, per element, only the changes of the winning sign, and average them (TIES)."""
    match: int | None = None
    """Scale by the square root of the share of sum d^2 that this other variant keeps."""
    label: tuple[tuple[str, Any], ...] = ()
    """For the manifest."""


@dataclass(frozen=True, slots=True)
class EditOptions:
    """What a user asks for; see ``forgetscale restore --help``."""

    method: Method = "restore"
    score: Score = "relative"
    scope: Scope = "global"
    side: Side = "top"
    fractions: tuple[Fraction, ...] = ()
    lambdas: tuple[float, ...] = (1.0,)
    weights: tuple[float, ...] = (1.0,)
    rescale: Rescale = "none"
    seed: int = 0
    eps: float = 1e-8
    narrow: bool = False
    gamma: Fraction = Fraction(1, 100)
    spread: Fraction = Fraction(1, 10)
    controls: bool = False
    also_scores: tuple[Score, ...] = ()
    """Scores by which the same share is put back in further variants, for comparison."""


@dataclass(slots=True)
class EditPlan:
    """Rankings, cuts and variants of one pass over the files."""

    rankings: list[Ranking]
    cuts: list[Cut]
    variants: list[Variant]

    def cut(self, ranking: Ranking, side: Side, share: Fraction, rest: Fraction | None) -> int:
        """Return the number of a cut, adding it where it is new."""
        if ranking not in self.rankings:
            self.rankings.append(ranking)
        found = Cut(self.rankings.index(ranking), side, share, rest)
        if found not in self.cuts:
            self.cuts.append(found)
        return self.cuts.index(found)

    @property
    def measures(self) -> bool:
        """Whether sums over what is kept are needed before writing."""
        return any(v.rescale in ("l1", "l2") or v.match is not None for v in self.variants)


def parse_fraction(text: str) -> Fraction:
    """Return a share in [0, 1] exactly as it was written (``0.2`` is one fifth).

    Raises:
        ConfigError: It is no number or out of range.
    """
    try:
        value = Fraction(Decimal(text))
    except (InvalidOperation, ValueError, OverflowError) as error:
        raise ConfigError(f"--fraction {text!r} is no number; give a share such as 0.2.") from error
    if not 0 <= value <= 1:
        raise ConfigError(f"--fraction {text} is outside 0..1; 0.2 stands for 20 %.")
    return value


def decimal(value: Fraction) -> str:
    """Return a fraction as it would be written."""
    return f"{float(value):g}"


def check_options(options: EditOptions, num_models: int, has_fisher: bool) -> None:
    """Check that the options make sense together.

    Raises:
        ConfigError: They do not; the message says which option to change.
    """
    method = options.method
    if method in WITHOUT_FRACTION and options.fractions:
        raise ConfigError(f"--method {method} drops nothing; leave --fraction out.")
    if method not in WITHOUT_FRACTION and not options.fractions:
        raise ConfigError(f"--method {method} needs --fraction, such as --fraction 0.2.")
    if num_models > 1 and method in ("restore", "wise-ft"):
        raise ConfigError(
            f"--method {method} edits one tuned model, got {num_models}; use ties,"
            " task-arithmetic, dare, breadcrumbs or della to put several together."
        )
    if len(options.weights) != num_models:
        raise ConfigError(f"--weights has {len(options.weights)} values for {num_models} models.")
    if (options.score == "fisher") != has_fisher and method == "restore":
        raise ConfigError("--score fisher and --fisher FILE go together; give both or neither.")
    if has_fisher and method != "restore":
        raise ConfigError(f"--fisher is not used by --method {method}; leave it out.")
    if options.controls and method != "restore":
        raise ConfigError("--controls are controls of --method restore.")
    if options.also_scores and method != "restore":
        raise ConfigError("--also-score belongs to --method restore; leave it out.")
    for score in options.also_scores:
        if score in ("fisher", "random", options.score):
            raise ConfigError(
                f"--also-score {score}: name relative, absolute or base, and not the --score itself"
                " (random is among --controls, fisher needs a command of its own)."
            )
    if not options.eps > 0:
        raise ConfigError(f"--eps must be > 0, got {options.eps}.")
    if not all(math.isfinite(value) for value in (*options.lambdas, *options.weights)):
        raise ConfigError("--lambda and --weights must be finite numbers.")
    if options.rescale == "inverse" and 1 in options.fractions:
        raise ConfigError("--rescale inverse divides by what is kept: --fraction 1 keeps nothing.")
    for fraction in options.fractions:
        if method == "breadcrumbs" and fraction < options.gamma:
            raise ConfigError(
                f"--fraction {decimal(fraction)} is below --gamma {decimal(options.gamma)}, the"
                " part of it dropped at the top."
            )
        if method == "della" and not options.spread <= fraction <= 1 - options.spread:
            raise ConfigError(
                f"--fraction {decimal(fraction)} with --spread {decimal(options.spread)} gives"
                " probabilities outside 0..1."
            )


def _drops(plan: EditPlan, options: EditOptions, fraction: Fraction, models: int) -> list[Drop]:
    def ranking(model: int, score: Score, scope: Scope) -> Ranking:
        seed = options.seed if score == "random" else 0
        return Ranking(score, scope, model, seed, options.eps, options.narrow)

    found = []
    for model in range(models):
        seed = options.seed + model
        if options.method == "restore":
            order = ranking(model, options.score, options.scope)
            cut = plan.cut(order, options.side, fraction, None)
            found.append(Drop("cut", (cut,)))
        elif options.method == "dare":
            found.append(Drop("draw", rate=fraction, seed=seed))
        elif options.method == "ties":
            order = ranking(model, "absolute", options.scope)
            cut = plan.cut(order, "top", Fraction(0), fraction)
            found.append(Drop("outside", (cut,)))
        elif options.method == "breadcrumbs":
            order = ranking(model, "absolute", "tensor")
            top = plan.cut(order, "top", options.gamma, None)
            kept = plan.cut(order, "top", options.gamma, fraction)
            found.append(Drop("outside_band", (top, kept)))
        elif options.method == "della":
            found.append(Drop("draw_ranked", rate=fraction, spread=options.spread, seed=seed))
        else:
            found.append(Drop("none"))
    return found


def _controls(
    plan: EditPlan, options: EditOptions, fraction: Fraction, original: int, stem: str
) -> list[Variant]:
    """Return random, opposite-side and norm-matched controls of one restoration."""
    base = Ranking("random", options.scope, 0, options.seed, options.eps, options.narrow)
    own = Ranking(
        options.score,
        options.scope,
        0,
        options.seed if options.score == "random" else 0,
        options.eps,
        options.narrow,
    )
    other: Side = "bottom" if options.side == "top" else "top"
    share = ("fraction", decimal(fraction))
    random = Drop("cut", (plan.cut(base, "top", fraction, None),))
    opposite = Drop("cut", (plan.cut(own, other, fraction, None),))
    return [
        Variant(f"{stem}-random", (random,), (1.0,), label=(("control", "random"), share)),
        Variant(f"{stem}-{other}", (opposite,), (1.0,), label=(("control", other), share)),
        Variant(
            f"{stem}-scaled",
            (Drop("none"),),
            (1.0,),
            match=original,
            label=(("control", "scaled"), share),
        ),
    ]


def _other_scores(
    plan: EditPlan, options: EditOptions, fraction: Fraction, stem: str
) -> list[Variant]:
    """Return the same share put back by other scores."""
    share = ("fraction", decimal(fraction))
    found = []
    for score in dict.fromkeys(options.also_scores):
        ranking = Ranking(score, options.scope, 0, 0, options.eps, options.narrow)
        drop = Drop("cut", (plan.cut(ranking, options.side, fraction, None),))
        label = (("control", score), share)
        found.append(Variant(f"{stem}-by-{score}", (drop,), (1.0,), label=label))
    return found


def plan_edits(options: EditOptions, num_models: int) -> EditPlan:
    """Return what is to be ranked, cut and written.

    Args:
        options: Checked options.
        num_models: Tuned models.
    """
    plan = EditPlan([], [], [])
    fractions: Sequence[Fraction] = options.fractions or (Fraction(0),)
    for fraction in dict.fromkeys(fractions):
        for factor in dict.fromkeys(options.lambdas):
            parts = [f"fraction-{decimal(fraction)}"] if options.fractions else []
            if len(options.lambdas) > 1 or not parts:
                parts.append(f"lambda-{factor:g}")
            stem = "-".join(parts)
            label = (
                ("method", options.method),
                ("fraction", decimal(fraction)),
                ("lambda", factor),
            )
            plan.variants.append(
                Variant(
                    stem,
                    tuple(_drops(plan, options, fraction, num_models)),
                    tuple(factor * weight for weight in options.weights),
                    options.rescale if options.method not in WITHOUT_FRACTION else "none",
                    fraction,
                    options.method == "ties",
                    label=label,
                )
            )
            if options.controls and fraction > 0:
                original = len(plan.variants) - 1
                plan.variants += _controls(plan, options, fraction, original, stem)
            if fraction > 0:
                plan.variants += _other_scores(plan, options, fraction, stem)
    return plan

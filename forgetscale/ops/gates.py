"""How much each target token counts, and which way it pulls: the forms behind all token losses.

Every loss here has, with respect to the logits of a position, the gradient

    scale (P - e_y)  +  mass P + uniform (other numbers at some ids)

where the first part is cross-entropy times a number without gradient, and the second (an
``Anchor``) is left out by most. A gate is a function of what the kernel knows of a few positions
(``TokenStats``) that returns these numbers (``TokenTerms``); the functions of this module make
gates. Losses that keep close to a source model are in ``forgetscale.ops.anchors``.

Shape letters: N positions, V vocabulary, K ids per position.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from forgetscale.ops.entropy import topk_entropy

LN_SMALLEST = math.log(1e-6)
MAX_LOG_RATIO = 20.0


class Anchor(NamedTuple):
    """A part of the gradient that does not point to the label."""

    mass: Float[Tensor, " N"]
    """Factor of ``P``."""
    uniform: float = 0.0
    """Added to every logit's gradient."""
    ids: Int64[Tensor, "N K"] | None = None
    """Logits with a gradient of their own, different ids in each row."""
    put: Float[Tensor, "N K"] | None = None
    """The part's gradient at ``ids``, in place of ``mass P + uniform``."""


class TokenTerms(NamedTuple):
    """What a gate says about each position."""

    value: Float[Tensor, " N"]
    """The loss in nats."""
    scale: Float[Tensor, " N"]
    """Factor of ``P - e_y``."""
    weight: Float[Tensor, " N"]
    """How much the token counts: summed for metrics and for ``normalize: weights``."""
    anchor: Anchor | None = None


class TokenStats:
    """What gates may look at: a few positions, fp32 or wider.

    Args:
        log_probs: Log-probabilities; the kernel's scratch, so gates must not change or keep them.
        labels: Target ids in 0..V-1; positions without loss carry any id and are masked later.
        extra: More tensors per position, by name, from whoever calls the loss.
    """

    def __init__(
        self,
        log_probs: Float[Tensor, "N V"],
        labels: Int64[Tensor, " N"],
        extra: Mapping[str, Tensor],
    ) -> None:
        self.log_probs = log_probs
        self.labels = labels
        self.log_prob = log_probs.gather(1, labels[:, None])[:, 0]
        self._extra = extra
        self._probs: Tensor | None = None

    def probs(self) -> Float[Tensor, "N V"]:
        """Return the probabilities, computed once."""
        if self._probs is None:
            self._probs = self.log_probs.exp()
        return self._probs

    def take_probs(self) -> Float[Tensor, "N V"]:
        """Return the probabilities for good, in the memory of the log-probabilities if need be."""
        return self.log_probs.exp_() if self._probs is None else self._probs

    def extra(self, name: str) -> Tensor:
        """Return a tensor given per position.

        Raises:
            ValueError: The caller gave none of this name.
        """
        if name not in self._extra:
            given = ", ".join(sorted(self._extra)) or "none"
            raise ValueError(f"this loss needs {name!r} for every position, got {given}")
        return self._extra[name]

    def optional(self, name: str) -> Tensor | None:
        """Return a tensor given per position, or None if the caller gave none of this name."""
        return self._extra.get(name)


Gate = Callable[[TokenStats], TokenTerms]


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise ValueError(sentence)


def weighted(stats: TokenStats, weight: Float[Tensor, " N"]) -> TokenTerms:
    """Return cross-entropy times a weight without gradient.

    Args:
        stats: The positions.
        weight: One number per position.
    """
    return TokenTerms(-weight * stats.log_prob, weight, weight)


def cross_entropy(*, label_smoothing: float = 0.0) -> Gate:
    """Return the gate of plain or smoothed cross-entropy.

    Args:
        label_smoothing: Share of the target spread evenly over the vocabulary, in [0, 1).
    """
    _require(0 <= label_smoothing < 1, f"label_smoothing must lie in [0, 1), got {label_smoothing}")

    def gate(stats: TokenStats) -> TokenTerms:
        ones = torch.ones_like(stats.log_prob)
        if label_smoothing == 0:
            return TokenTerms(-stats.log_prob, ones, ones)
        size = stats.log_probs.shape[1]
        value = (label_smoothing - 1) * stats.log_prob
        value = value - label_smoothing * stats.log_probs.mean(-1)
        anchor = Anchor(label_smoothing * ones, uniform=-label_smoothing / size)
        return TokenTerms(value, (1 - label_smoothing) * ones, ones, anchor)

    return gate


def eaft(
    *,
    alpha: float = 1.0,
    top_k: int = 20,
    divisor: Literal["ln_k"] | float = "ln_k",
    gate: Literal["power", "sigmoid", "hard"] = "power",
    slope: float = 30.0,
    threshold: float = 0.17,
) -> Gate:
    """Return the entropy gate: tokens the model is sure about count little.

    With ``h`` the top-k entropy over ``divisor``: ``h ** alpha`` (power), ``sigmoid(slope (h -
    threshold))`` or 1 where ``h > threshold`` and else 0 (hard).

    Args:
        alpha: Power, no unit, >= 0; for ``power`` only. 0 gives plain cross-entropy.
        top_k: Number of largest logits used for the entropy, >= 2.
        divisor: What the entropy is divided by, in nats: ``ln_k`` for its largest value, or a
            number > 0 (the published code has 3.0).
        gate: Form of the weight.
        slope: Steepness of ``sigmoid``, > 0.
        threshold: Where ``sigmoid`` is one half and ``hard`` begins, in units of ``h``.

    Source:
        arXiv:2601.02151 section 5.1 and appendix G. The paper sets the hard mask at the 15th
        percentile of an unnamed population; we take the threshold itself, which needs no second
        pass over the batch, and report the share that fell below.
    """
    _require(alpha >= 0, f"alpha must be >= 0, got {alpha}; use 0 for plain cross-entropy")
    _require(top_k >= 2, f"top_k must be >= 2, got {top_k}")
    _require(slope > 0, f"slope must be > 0, got {slope}")
    _require(gate in ("power", "sigmoid", "hard"), f"gate must be power, sigmoid or hard: {gate!r}")
    scale = math.log(top_k) if divisor == "ln_k" else divisor
    _require(
        isinstance(scale, int | float) and scale > 0, f"divisor must be ln_k or > 0, got {divisor}"
    )

    def weigh(stats: TokenStats) -> TokenTerms:
        share = topk_entropy(stats.log_probs, top_k) / scale
        if gate == "sigmoid":
            return weighted(stats, torch.sigmoid(slope * (share - threshold)))
        if gate == "hard":
            return weighted(stats, (share > threshold).to(share.dtype))
        return weighted(stats, share.pow(alpha))

    return weigh


def dft() -> Gate:
    """Return the gate of dynamic fine-tuning: the probability of the label.

    Source:
        arXiv:2508.05629; its gradient is that of ``1 - p``.
    """
    return lambda stats: weighted(stats, stats.log_prob.exp())


def q_log(*, q: float = 1.0) -> Gate:
    """Return the loss ``(1 - p^q) / q``.

    Args:
        q: > 0; towards 0 it becomes cross-entropy, 1 is ``1 - p``.

    Source:
        The family of arXiv:2602.11424.
    """
    _require(q > 0, f"q must be > 0, got {q}")

    def gate(stats: TokenStats) -> TokenTerms:
        scale = (q * stats.log_prob).exp()
        return TokenTerms(-torch.expm1(q * stats.log_prob) / q, scale, scale)

    return gate


def deft() -> Gate:
    """Return ``(1 - p^C) / C`` with the model's own ``C = sum P^2``, without gradient.

    Source:
        arXiv:2602.11424. Its code adds 1e-6 to the denominator; ``C`` is at least 1/V, so we need
        no such term.
    """

    def gate(stats: TokenStats) -> TokenTerms:
        power = stats.probs().square().sum(-1)
        exponent = power * stats.log_prob
        return TokenTerms(-torch.expm1(exponent) / power, exponent.exp(), exponent.exp())

    return gate


def focal(*, gamma: float = 2.0, detached: bool = False) -> Gate:
    """Return the focal loss ``(1 - p)^gamma`` times cross-entropy: hard tokens count more.

    Args:
        gamma: >= 0; 0 gives plain cross-entropy.
        detached: Let the factor carry no gradient.

    Source:
        arXiv:1708.02002, where the factor carries gradient.
    """
    _require(gamma >= 0, f"gamma must be >= 0, got {gamma}")

    def gate(stats: TokenStats) -> TokenTerms:
        missing = -torch.expm1(stats.log_prob)
        factor = missing.pow(gamma)
        scale = factor
        if not detached and gamma > 0:
            # ln p vanishes faster than (1 - p)^(gamma - 1) grows; the clamp keeps 0 inf out.
            slope = missing.clamp_min(torch.finfo(missing.dtype).tiny).pow(gamma - 1)
            scale = factor - gamma * slope * stats.log_prob.exp() * stats.log_prob
        return TokenTerms(-factor * stats.log_prob, scale, factor)

    return gate


def mile(*, sigma: float = 1.0, gamma: float = 1.0) -> Gate:
    """Return the weight ``(sigma + H)^gamma`` with the entropy ``H`` over the whole vocabulary.

    The published loss divides by the mean weight of the batch, which is ``normalize: weights``.

    Args:
        sigma: >= 0, in nats.
        gamma: Power.

    Source:
        arXiv:2310.19531.
    """
    _require(sigma >= 0, f"sigma must be >= 0, got {sigma}")

    def gate(stats: TokenStats) -> TokenTerms:
        entropy = torch.special.entr(stats.probs()).sum(-1)
        return weighted(stats, (sigma + entropy).pow(gamma))

    return gate


def talr(*, tau: float, floor: float = 0.01) -> Gate:
    """Return the weight ``max(p^(1/tau), floor)``: hard tokens count less.

    Args:
        tau: Temperature in nats, > 0.
        floor: Smallest weight, in [0, 1].

    Source:
        arXiv:2509.20758, whose tau is the median loss of each batch. A median needs all losses of
        the step on all ranks before the first weight, hence a second forward pass; we take a
        number, for instance the median or mean loss of the source model on the target data.
    """
    _require(tau > 0, f"tau must be > 0, got {tau}")
    _require(0 <= floor <= 1, f"floor must lie in [0, 1], got {floor}")

    def gate(stats: TokenStats) -> TokenTerms:
        return weighted(stats, (stats.log_prob.clamp_min(LN_SMALLEST) / tau).exp().clamp_min(floor))

    return gate


def constant_gate(*, mean_gate: float) -> Gate:
    """Return the same weight for every token: a control for what smaller steps do by themselves.

    Args:
        mean_gate: The weight, in (0, 1]; for instance ``method/mean_gate`` of the run it controls.
    """
    _require(0 < mean_gate <= 1, f"mean_gate must lie in (0, 1], got {mean_gate}")
    return lambda stats: weighted(stats, torch.full_like(stats.log_prob, mean_gate))


def random_gate(*, mean_gate: float, form: Literal["power", "drop"] = "power") -> Gate:
    """Return weights drawn at random: a control for what an uneven gate does by itself.

    With ``u`` the position's ``noise`` in [0, 1): ``u^(1/m - 1)``, which has the mean ``m`` and
    lies anywhere in [0, 1] (power), or 1 with probability ``m`` and else 0 (drop).

    Args:
        mean_gate: Mean weight ``m``, in (0, 1].
        form: Distribution of the weight.
    """
    _require(0 < mean_gate <= 1, f"mean_gate must lie in (0, 1], got {mean_gate}")
    _require(form in ("power", "drop"), f"form must be power or drop, got {form!r}")

    def gate(stats: TokenStats) -> TokenTerms:
        noise = stats.extra("noise").to(stats.log_prob)
        if form == "drop":
            return weighted(stats, (noise < mean_gate).to(noise.dtype))
        return weighted(stats, noise.pow(1 / mean_gate - 1))

    return gate


def flow() -> Gate:
    """Return a weight given per position (``sequence_weight``), fixed before training.

    Source:
        arXiv:2502.02797: ``exp(-f / tau)`` of the source model's mean loss ``f`` on the sequence.
    """
    return lambda stats: weighted(stats, stats.extra("sequence_weight").to(stats.log_prob))


def iw_sft(*, low: float = 0.2, high: float = 1.8) -> Gate:
    """Return the importance weight ``clip(p / p_ref, low, high)``; needs ``reference_log_prob``.

    Args:
        low: Smallest weight, >= 0.
        high: Largest weight, >= low.

    Source:
        arXiv:2507.12856, the form per token.
    """
    _require(0 <= low <= high, f"low and high must satisfy 0 <= low <= high, got {low}, {high}")

    def gate(stats: TokenStats) -> TokenTerms:
        ratio = (stats.log_prob - stats.extra("reference_log_prob")).clamp_max(MAX_LOG_RATIO)
        return weighted(stats, ratio.exp().clamp(low, high).to(stats.log_prob.dtype))

    return gate


def psft(*, clip_low: float = 0.2, clip_high: float = 0.28) -> Gate:
    """Return ``-min(r, clip(r))`` of the ratio ``r = p / p_old``; needs ``old_log_prob``.

    Args:
        clip_low: ``r`` is clipped below ``1 - clip_low``, which the minimum undoes.
        clip_high: A token whose ratio exceeds ``1 + clip_high`` has no gradient.

    Source:
        arXiv:2508.17784, with an advantage of 1; log-ratios are held within 20 as in its code.
    """
    _require(clip_low >= 0 and clip_high >= 0, f"clips must be >= 0, got {clip_low}, {clip_high}")

    def gate(stats: TokenStats) -> TokenTerms:
        ratio = stats.log_prob - stats.extra("old_log_prob")
        ratio = ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp().to(stats.log_prob.dtype)
        clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
        scale = ratio * (ratio <= 1 + clip_high)
        return TokenTerms(-torch.minimum(ratio, clipped), scale, scale)

    return gate


@dataclass(frozen=True, slots=True)
class Form:
    """A kind of loss: the function that makes its gate, and what its gate does."""

    make: Callable[..., Gate]
    gates: bool = True
    """Tokens count differently, so that the mean weight is worth reporting."""
    needs: tuple[str, ...] = ()
    """Tensors per position that its gate asks for by ``TokenStats.extra``."""

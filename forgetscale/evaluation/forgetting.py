"""How forgetting grows with the amount of fine-tuning: ``loss = before + A * D^beta + E``.

Source: the form of Bethune et al. 2025 at a share of 0 of pre-training data, with one model size:
``L_pt = L_pt0 + A D_ft^beta / N^alpha + E``. AlignGuard-LoRA (arXiv:2508.02079) is said to use it;
its fitted values are not known. "Flatter" forgetting is a smaller ``A`` and ``E``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from forgetscale.evaluation.bootstrap import Interval

LEAST_SIZES = 4
NUM_RESAMPLES = 1000
_BETAS = np.geomspace(0.02, 3.0, 101)
_REFINEMENTS = 4


@dataclass(frozen=True, slots=True)
class ForgettingLaw:
    """A fitted law with 95 % intervals.

    Attributes:
        amplitude: ``A``, in nats, at ``unit`` tokens.
        exponent: ``beta``.
        offset: ``E``, in nats.
        unit: Fine-tuning tokens that count as 1 (the largest size), so that ``A`` is the forgetting
            the power adds there.
        n: Points fitted.
        error: Root mean square of what the fit leaves, in nats.
    """

    amplitude: Interval
    exponent: Interval
    offset: Interval
    unit: float
    n: int
    error: float

    def loss(self, tokens: float, before: float) -> float:
        """Return the pre-training loss expected after fine-tuning on ``tokens``.

        Args:
            tokens: Fine-tuning tokens, > 0.
            before: Loss before fine-tuning, nats.
        """
        power: float = (tokens / self.unit) ** self.exponent.value
        return before + self.amplitude.value * power + self.offset.value

    def to_json(self) -> dict[str, Any]:
        """Return the numbers as a JSON object."""
        named = {"A": self.amplitude, "beta": self.exponent, "E": self.offset}
        found: dict[str, Any] = {
            name: {"value": i.value, "low": i.low, "high": i.high} for name, i in named.items()
        }
        return found | {"unit_tokens": self.unit, "n": self.n, "error": self.error}


def _errors(sizes: np.ndarray, rises: np.ndarray, betas: np.ndarray) -> np.ndarray:
    """Return what is left of the squares, ``[rows, betas]``: a line through ``sizes ** beta``.

    Args:
        sizes: ``[n]``, in (0, 1].
        rises: ``[rows, n]``.
        betas: ``[betas]``, or ``[rows, betas]`` with exponents of each row's own.
    """
    powers = sizes ** np.broadcast_to(betas, (len(rises), betas.shape[-1]))[..., None]
    powers = powers - powers.mean(-1, keepdims=True)
    centred = (rises - rises.mean(-1, keepdims=True))[:, None]
    explained = (powers * centred).sum(-1) ** 2 / (powers**2).sum(-1)
    errors: np.ndarray = (centred**2).sum(-1) - explained
    return errors


def _fit(sizes: np.ndarray, rises: np.ndarray) -> np.ndarray:
    """Return ``A, beta, E`` of each row by least squares, ``[rows, 3]``; ``beta`` is searched."""
    betas = np.broadcast_to(_BETAS, (len(rises), len(_BETAS)))
    for _ in range(_REFINEMENTS):
        best = np.argmin(_errors(sizes, rises, betas), axis=1)
        low, high = (
            np.take_along_axis(betas, np.clip(best + side, 0, betas.shape[1] - 1)[:, None], 1)
            for side in (-1, 1)
        )
        betas = low + (high - low) * np.linspace(0.0, 1.0, len(_BETAS))
    best = np.argmin(_errors(sizes, rises, betas), axis=1)
    beta = np.take_along_axis(betas, best[:, None], 1)
    powers = sizes**beta
    centred = powers - powers.mean(1, keepdims=True)
    slope = (centred * rises).sum(1) / (centred**2).sum(1)
    return np.stack([slope, beta[:, 0], rises.mean(1) - slope * powers.mean(1)], axis=1)


def fit_forgetting_law(
    tokens: Sequence[float],
    losses: Sequence[float],
    before: Sequence[float],
    *,
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
) -> ForgettingLaw:
    """Fit the law to runs of several sizes, with a bootstrap over residuals.

    Residuals are spread by ``sqrt(n / (n - 3))`` for the three fitted numbers. The search for
    ``beta`` runs over 0.02 to 3: an interval that reaches an end says that the sizes do not tell.

    Args:
        tokens: Fine-tuning tokens of each run, > 0; at least four different ones.
        losses: Held-out pre-training loss after each run, nats.
        before: The same before it, nats.
        seed: Seed of the resamples.
        num_resamples: Resamples, >= 100.

    Raises:
        ValueError: Fewer than four sizes, lists of different lengths, or a size not above 0.

    Source:
        Davison and Hinkley 1997, section 6.2.3 (residuals).
    """
    sizes = np.asarray(tokens, dtype=np.float64)
    rises = np.asarray(losses, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    if sizes.shape != rises.shape or sizes.ndim != 1:
        raise ValueError(f"expected equal rows, got {sizes.shape} sizes and {rises.shape} losses")
    if len(set(sizes.tolist())) < LEAST_SIZES:
        raise ValueError(
            f"expected at least {LEAST_SIZES} different sizes for three numbers to fit, got"
            f" {len(set(sizes.tolist()))}"
        )
    if not (sizes > 0).all():
        raise ValueError(f"sizes must be > 0, got {sizes.min()}")
    unit = float(sizes.max())
    scaled = sizes / unit
    (found,) = _fit(scaled, rises[None])
    expected = found[0] * scaled ** found[1] + found[2]
    left = rises - expected
    spread = (left - left.mean()) * np.sqrt(len(left) / (len(left) - 3))
    generator = np.random.default_rng([seed, len(left)])
    noise = generator.choice(spread, (num_resamples, len(left)))
    drawn = _fit(scaled, expected + noise)
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    amplitude, exponent, offset = (
        Interval(float(found[i]), float(low[i]), float(high[i])) for i in range(3)
    )
    return ForgettingLaw(
        amplitude, exponent, offset, unit, len(left), float(np.sqrt((left @ left) / len(left)))
    )

"""Means over seeds with 95 % t intervals, single and paired."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

# 97.5 % quantiles of Student's t for 1 to 30 degrees of freedom
_T = (
    (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)
    + (2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860)
    + (2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423)
)


@dataclass(frozen=True, slots=True)
class SeedMean:
    """A mean over seeds; the interval is None with one seed."""

    mean: float
    low: float | None
    high: float | None
    num_seeds: int

    def to_json(self) -> dict[str, float | int | None]:
        """Return the mean as a JSON object."""
        return {
            "mean": self.mean,
            "low": self.low,
            "high": self.high,
            "num_seeds": self.num_seeds,
        }


def t_quantile(degrees: int) -> float:
    """Return the 97.5 % quantile of Student's t.

    Args:
        degrees: Degrees of freedom, >= 1; above 30 by two terms of the Cornish-Fisher
            expansion (error below 0.001).
    """
    if degrees < 1:
        raise ValueError(f"degrees of freedom must be >= 1, got {degrees}")
    if degrees <= len(_T):
        return _T[degrees - 1]
    z = 1.959964
    first = (z**3 + z) / (4 * degrees)
    return z + first + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


def seed_mean(values: Sequence[float]) -> SeedMean | None:
    """Return the mean of one value per seed with its t interval; None without values."""
    if not values:
        return None
    mean = fmean(values)
    if len(values) == 1:
        return SeedMean(mean, None, None, 1)
    half = t_quantile(len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return SeedMean(mean, mean - half, mean + half, len(values))


def mean_with_seeds(values: Mapping[int, float]) -> dict[str, Any] | None:
    """Return the mean of one value per seed, its interval and the values; None without values."""
    mean = seed_mean(list(values.values()))
    if mean is None:
        return None
    return {**mean.to_json(), "seeds": {str(seed): value for seed, value in values.items()}}


def paired_difference(values: Mapping[int, float], control: Mapping[int, float]) -> SeedMean | None:
    """Return the mean of ``values - control`` over the seeds that have both."""
    return seed_mean([values[seed] - control[seed] for seed in sorted(values) if seed in control])

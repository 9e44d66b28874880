"""95 % bootstrap intervals over documents, rows or questions: seeded and vectorised."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

NUM_RESAMPLES = 2000
_CHUNK_ELEMENTS = 1 << 20


@dataclass(frozen=True, slots=True)
class Interval:
    """A measured value with its 95 % interval."""

    value: float
    low: float
    high: float


def interval_seed(seed: int, name: str) -> np.random.Generator:
    """Return the generator of task ``name``: the same resamples before and after training."""
    digest = hashlib.sha256(name.encode()).digest()
    return np.random.default_rng([seed, int.from_bytes(digest[:8], "little")])


def bootstrap_mean(
    values: np.ndarray,
    generator: np.random.Generator,
    *,
    num_resamples: int = NUM_RESAMPLES,
) -> Interval:
    """Mean of ``values`` with its 95 % percentile bootstrap interval.

    Args:
        values: One number per sample, ``[n]``, n >= 1.
        generator: Source of the resamples.
        num_resamples: Resamples of n samples with replacement, >= 1000.

    Returns:
        Mean with the 2.5 % and 97.5 % quantiles of the resampled means. If all values are equal
        the interval has no width: resampling cannot show what was never seen.

    Raises:
        ValueError: ``values`` is empty or ``num_resamples`` is below 1000.

    Source:
        Efron 1979, percentile bootstrap.
    """
    return bootstrap_ratio(values, np.ones(len(values)), generator, num_resamples=num_resamples)


def bootstrap_ratio(
    numerators: np.ndarray,
    denominators: np.ndarray,
    generator: np.random.Generator,
    *,
    num_resamples: int = NUM_RESAMPLES,
) -> Interval:
    """Ratio of sums, such as nats over tokens, with its 95 % interval over whole samples.

    Args:
        numerators: Summed quantity of each sample, ``[n]``, n >= 1.
        denominators: Its weight, ``[n]``, > 0.
        generator: Source of the resamples.
        num_resamples: Resamples of n samples with replacement, >= 1000.

    Returns:
        ``sum(numerators) / sum(denominators)`` and the quantiles of the same over resamples.

    Raises:
        ValueError: No samples, unequal lengths, or fewer than 1000 resamples.
    """
    top = np.asarray(numerators, dtype=np.float64)
    bottom = np.asarray(denominators, dtype=np.float64)
    if top.ndim != 1 or top.shape != bottom.shape or len(top) == 0:
        raise ValueError(
            f"expected two equal rows of at least one number, got {top.shape} and {bottom.shape}"
        )
    if num_resamples < 1000:
        raise ValueError(f"num_resamples must be >= 1000, got {num_resamples}")
    num_samples = len(top)
    ratios = np.empty(num_resamples)
    rows = max(1, _CHUNK_ELEMENTS // num_samples)
    both = np.stack([top, bottom], axis=1)
    for start in range(0, num_resamples, rows):
        count = min(rows, num_resamples - start)
        drawn = generator.integers(0, num_samples, size=(count, num_samples))
        sums = both[drawn].sum(axis=1)
        ratios[start : start + count] = sums[:, 0] / sums[:, 1]
    low, high = np.quantile(ratios, [0.025, 0.975])
    return Interval(float(top.sum() / bottom.sum()), float(low), float(high))

"""Learning rate as a pure function of the step."""

from __future__ import annotations

import math


def num_warmup_steps(num_steps: int, warmup_fraction: float) -> int:
    """Return ``ceil(warmup_fraction * num_steps)``, as the reference training script does."""
    return math.ceil(round(warmup_fraction * num_steps, 6))


def learning_rate(
    step: int, *, num_steps: int, peak: float, schedule: str, warmup_fraction: float
) -> float:
    """Return the rate of optimizer step ``step``.

    Args:
        step: Step number, 1 for the first.
        num_steps: Steps in all, > 0.
        peak: Highest rate.
        schedule: ``cosine`` (to 0), ``linear`` (to 0) or ``constant``.
        warmup_fraction: Share of steps with linearly rising rate.

    Returns:
        The rate. The first warmup step has rate 0, as in ``transformers``' schedules, whose
        counter starts at 0: 12,208 steps with 611 of warmup sum to 0.3052 at peak 5e-5.

    Raises:
        ValueError: ``schedule`` is unknown or ``step`` is outside ``1..num_steps``.
    """
    if not 1 <= step <= num_steps:
        raise ValueError(f"step must lie in 1..{num_steps}, got {step}")
    done, warmup = step - 1, num_warmup_steps(num_steps, warmup_fraction)
    if done < warmup:
        return peak * done / max(1, warmup)
    progress = (done - warmup) / max(1, num_steps - warmup)
    if schedule == "cosine":
        return peak * 0.5 * (1.0 + math.cos(math.pi * progress))
    if schedule == "linear":
        return peak * (1.0 - progress)
    if schedule == "constant":
        return peak
    raise ValueError(f"schedule must be cosine, linear or constant, got {schedule!r}")

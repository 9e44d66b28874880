"""A penalty whose gradient steps overshoot it, seen while the run goes on.

For weights held near an anchor a bound on the learning rate is known before the first step (see
``methods.anchored``). For an adapter there is none: the penalty's curvature in ``B`` grows with
``A`` and the other way round, and Adam's steps are as long as the learning rate whatever the
gradient, so they jump to and fro across a stiff penalty instead of leaving for good. What tells
is the objective. Every run of this kind starts at no change, where the penalty is zero, so its
objective is the first loss; a penalty that alone is larger than that has left a point behind that
was better, whatever the task has gained.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Any

from forgetscale.errors import ConfigError

NUM_STEPS = 8
"""Steps looked at together: more than half of them must be too high, so one bad step is not enough
and a step that happens to cross the minimum does not hide the others."""


class OvershootWatch:
    """Stops a run whose penalty has outgrown what the run started with.

    Looks at methods that add a penalty's gradient; to others it says nothing.

    Args:
        section: The recipe's method.
        first_loss: Loss of the run's first step; None if that is yet to come.
    """

    def __init__(self, section: Any, first_loss: float | None) -> None:
        self._section = section
        self._first = first_loss
        self._recent: deque[tuple[float, float]] = deque(maxlen=NUM_STEPS)

    def look(self, step: int, loss: float, found: Mapping[str, float]) -> None:
        """Take in a step.

        Losses of now count beside the first one, whose rows may have been easy.

        Args:
            step: Its number.
            loss: Mean loss of its target tokens before the step, without the penalty.
            found: What the method reports of it.

        Raises:
            ConfigError: The penalty overshoots.
        """
        if self._first is None:
            self._first = loss
        if "penalty" not in found or "penalty_grad_norm" not in found:
            return
        self._recent.append((found["penalty"], loss))
        if len(self._recent) < NUM_STEPS:
            return
        penalty, now = (median(values) for values in zip(*self._recent, strict=True))
        if penalty > max(self._first, now):
            raise ConfigError(self._sentence(step, penalty, now))

    def _sentence(self, step: int, penalty: float, now: float) -> str:
        section = self._section
        prox = hasattr(section, "action") and getattr(section, "reading", "left") in (
            "left",
            "right",
        )
        advice = "use method.action: prox, stable for any strength, or lower" if prox else "lower"
        return (
            f"step {step}: the penalty of method.kind {section.kind} (median of {NUM_STEPS} steps"
            f" {penalty:.4g}) is larger than the loss the run began with ({self._first:.4g}) and"
            f" than the loss now ({now:.4g}), so steps of optim.lr overshoot it and no change at"
            f" all would be better; {advice} method.strength ({section.strength:g}) or optim.lr,"
            " and start a new run.output_dir."
        )

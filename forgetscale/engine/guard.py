"""Judges whether a step's numbers can be right, from what all ranks share and nothing else.

What it remembers goes into every checkpoint, so a resumed run judges as the uninterrupted one.
Numbers of skipped steps stay out of the window: one NaN in it would make every later comparison
false.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from forgetscale.config import GuardConfig

MAD_TO_SIGMA = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation."""
SMALLEST_SIGMA = 1e-3
"""Of a window whose numbers hardly differ: relative to the median's size, absolute for logs."""


def limit_of(window: Sequence[float], sigmas: float, scale: float) -> float:
    """Return the value from which on a number is a spike.

    Args:
        window: Numbers of earlier steps, one at least.
        sigmas: Robust standard deviations above the median, > 0.
        scale: What a deviation is at least measured against, such as the size of the median.
    """
    middle = statistics.median(window)
    sigma = MAD_TO_SIGMA * statistics.median(abs(value - middle) for value in window)
    return middle + sigmas * max(sigma, SMALLEST_SIGMA * scale)


class Guard:
    """The window of accepted steps and the list of skipped ones.

    Args:
        config: Thresholds.
        remembered: ``state`` of an earlier start, {} for none.

    Attributes:
        skips: Skipped steps within the window, as ``{"step": ..., "rows": [[set, row], ...]}``.
        num_skipped: Skipped steps since the start of the run.
    """

    def __init__(self, config: GuardConfig, remembered: Mapping[str, Any]) -> None:
        self.config = config
        size = config.window_steps
        self._losses: deque[float] = deque(remembered.get("losses", ()), size)
        self._norms: deque[float] = deque(remembered.get("log_norms", ()), size)
        self.skips: list[dict[str, Any]] = list(remembered.get("skips", ()))
        self.num_skipped = int(remembered.get("num_skipped", 0))

    @property
    def watches_spikes(self) -> bool:
        """True if norms of gradients are needed."""
        return self.config.spike_sigmas is not None

    def loss_limit(self) -> float:
        """Return the loss from which on a step is a spike; infinite while too little is known."""
        sigmas = self.config.spike_sigmas
        if sigmas is None or 4 * len(self._losses) < self.config.window_steps:
            return math.inf
        return limit_of(self._losses, sigmas, abs(statistics.median(self._losses)))

    def spike(self, loss: float, norm: float) -> str | None:
        """Return why a step with finite numbers is to be skipped, None if it is not.

        Args:
            loss: Mean over the targets of all ranks.
            norm: Norm of the gradient of all ranks, before anything was changed in it.
        """
        limit = self.loss_limit()
        if loss > limit:
            return f"the loss {loss:.4g} lies above {limit:.4g}"
        sigmas = self.config.spike_sigmas
        if sigmas is None or math.isinf(limit) or norm <= 0:
            return None
        limit = limit_of(self._norms, sigmas, 1.0)
        if math.log(norm) > limit:
            return f"the gradient norm {norm:.4g} lies above {math.exp(limit):.4g}"
        return None

    def accept(self, loss: float, norm: float) -> None:
        """Remember a step that was done."""
        if self.watches_spikes:
            self._losses.append(loss)
            self._norms.append(math.log(max(norm, 1e-30)))

    def skip(self, step: int, rows: Sequence[tuple[str, int]]) -> bool:
        """Remember a step that was skipped; return whether there were too many.

        Args:
            step: The step.
            rows: Rows to blame: content hash of the set and row number.
        """
        self.num_skipped += 1
        first = step - self.config.window_steps
        self.skips = [found for found in self.skips if found["step"] > first]
        self.skips.append({"step": step, "rows": [list(row) for row in rows]})
        return len(self.skips) >= self.config.max_skips

    def forgive(self) -> None:
        """Forget the skipped steps of the window: their rows are in quarantine."""
        self.skips = []

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold; {} if nothing happened and nothing is watched."""
        found = {
            "losses": list(self._losses),
            "log_norms": list(self._norms),
            "skips": self.skips,
            "num_skipped": self.num_skipped,
        }
        return found if any(found.values()) else {}

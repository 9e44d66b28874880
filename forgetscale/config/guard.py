"""What is done about steps whose numbers cannot be right."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from pydantic import ConfigDict

from forgetscale.config.ranges import STRICT, require


@dataclass(frozen=True, kw_only=True, slots=True)
class GuardConfig:
    """Thresholds of the ladder: skip the step, go back and quarantine its rows, stop."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    spike_sigmas: float | None = None
    """A finite loss or gradient norm is a spike when it lies this many robust standard deviations
    (1.4826 x MAD; of norms in logarithms) above the median of the window, > 0. None: only numbers
    that are not finite count. Rows that surprise the model may be the very ones to learn from, so
    nothing is skipped for that unless asked for; 10 is cautious."""
    window_steps: int = 128
    """Steps that are remembered, >= 8; spikes are judged once a quarter of them is known."""
    max_skips: int = 3
    """Skipped steps within the window with which the run goes back, >= 1."""
    max_rollbacks: int = 2
    """Times that a run goes back before it stops, >= 0."""

    def __post_init__(self) -> None:
        """Check ranges."""
        sigmas = self.spike_sigmas
        require(
            sigmas is None or (sigmas > 0 and math.isfinite(sigmas)),
            f"spike_sigmas must be > 0, got {sigmas}",
        )
        require(self.window_steps >= 8, f"window_steps must be >= 8, got {self.window_steps}")
        require(self.max_skips >= 1, f"max_skips must be >= 1, got {self.max_skips}")
        require(self.max_rollbacks >= 0, f"max_rollbacks must be >= 0, got {self.max_rollbacks}")

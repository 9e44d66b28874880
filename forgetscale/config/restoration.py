"""Recipe section of restoration while training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import ConfigDict

from forgetscale.config.ranges import STRICT, require


@dataclass(frozen=True, kw_only=True, slots=True)
class RestoreConfig:
    """Every so many steps the source values return to a share of the trained weights.

    The same choice as ``forgetscale restore`` makes after training: exact count, of equal scores
    the earlier by name and flat index. It goes with any protection; elements that are frozen
    are not counted.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    every_steps: int
    """Steps between two restorations, > 0; one is made after each step that it divides."""
    fraction: float
    """Share that goes back, in (0, 1)."""
    score: Literal["relative", "absolute", "base"] = "relative"
    """``relative`` |d| / (|source| + eps), ``absolute`` |d|, ``base`` |source|."""
    side: Literal["top", "bottom"] = "top"
    """The highest or the lowest scores go back."""
    scope: Literal["global", "tensor"] = "global"
    """All weights are ranked together, or each tensor for itself."""
    eps: float = 1.0e-8
    """Of ``relative``, > 0."""
    momentum: Literal["zero", "keep"] = "zero"
    """First moment of a restored element: ``keep`` lets it run on where it was heading. The second
    moment stays, because without it the next step would be several times as large."""
    include: str | None = None
    """Regular expression searched in tensor names; None with ``exclude`` None: decoder layers
    without norms."""
    exclude: str | None = None
    """Tensors that are left out, in the same way."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require(self.every_steps > 0, f"every_steps must be > 0, got {self.every_steps}")
        require(0 < self.fraction < 1, f"fraction must lie in (0, 1), got {self.fraction}")
        require(
            math.isfinite(self.eps) and self.eps > 0,
            f"eps must be finite and > 0, got {self.eps}",
        )

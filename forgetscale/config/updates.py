"""Recipe sections of methods that change what a step does to the weights, for comparisons."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import ConfigDict

from forgetscale.config.anchored import require_strength
from forgetscale.config.losses import CrossEntropyLossConfig, LossConfig
from forgetscale.config.ranges import STRICT, require


@dataclass(frozen=True, kw_only=True, slots=True)
class SpdMethodConfig:
    """Selective projection decay (arXiv:2411.01713): a tensor that moves away too fast is pulled.

    The published optimizer has no decay towards zero: set ``optim.weight_decay`` to 0 to match it.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    kind: Literal["spd"]
    loss: LossConfig = CrossEntropyLossConfig()
    """What is minimised; any loss goes with any protection."""
    strength: float = 1.0
    """Share of a step's growth of the distance that is taken back, >= 0 (the published
    ``weight_decay``); with 1 the distance to the source does not grow in such a step."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require_strength("strength", self.strength)


@dataclass(frozen=True, kw_only=True, slots=True)
class MofoMethodConfig:
    """MoFO (arXiv:2407.20999): in each tensor only the entries of largest momentum are moved."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    kind: Literal["mofo"]
    loss: LossConfig = CrossEntropyLossConfig()
    """What is minimised; any loss goes with any protection."""
    fraction: float = 0.03
    """Share of each matrix that a step moves, in (0, 1]; 1 is plain training."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require(0 < self.fraction <= 1, f"fraction must lie in (0, 1], got {self.fraction}")

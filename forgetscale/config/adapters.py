"""Recipe section ``adapter``: low-rank factors beside frozen weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import ConfigDict

from forgetscale.config.ranges import STRICT, require

ALL_LINEAR: Literal["all-linear"] = "all-linear"
ADAPTED_METHODS = ("sft",)
"""Values of ``method.kind`` that can be trained through an adapter."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraAdapterConfig:
    """LoRA (arXiv:2106.09685): ``W + scale * B A``; only ``A`` and ``B`` are trained."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    kind: Literal["lora"]
    rank: int = 8
    """Columns of ``B`` and rows of ``A``, > 0."""
    alpha: float = 16.0
    """``scale`` is ``alpha / rank``, > 0."""
    rslora: bool = False
    """``scale`` is ``alpha / sqrt(rank)`` (arXiv:2312.03732)."""
    dropout: float = 0.0
    """Share of a layer's inputs that ``A`` does not see in training, in [0, 1). It draws from each
    process's own generator: runs of other numbers of processes then differ by that noise."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = ALL_LINEAR
    """Last names of the linear layers to adapt, such as ``q_proj``, or longer ends of their names;
    ``all-linear`` takes all but the output head."""
    init: Literal["kaiming", "gaussian"] = "kaiming"
    """First values of ``A``: uniform in ``+-1 / sqrt(in features)``, or normal with deviation
    ``1 / rank``; drawn from ``run.seed``, the layer's name and the element's place. ``B`` is 0."""
    merge: bool = True
    """``train.export`` writes the merged model too; false writes the adapter folder alone."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require(self.rank > 0, f"rank must be > 0, got {self.rank}")
        require(
            math.isfinite(self.alpha) and self.alpha > 0,
            f"alpha must be finite and > 0, got {self.alpha}",
        )
        require(0 <= self.dropout < 1, f"dropout must lie in [0, 1), got {self.dropout}")
        require(
            self.target_modules == ALL_LINEAR or len(self.target_modules) > 0,
            "target_modules is empty, so nothing would be trained; name layers or say all-linear",
        )

    @property
    def scale(self) -> float:
        """What ``B A`` is multiplied with."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


AdapterConfig = LoraAdapterConfig

"""Recipe section ``adapter``: low-rank factors beside frozen weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Discriminator

from forgetscale.config.ranges import STRICT, require

ALL_LINEAR: Literal["all-linear"] = "all-linear"
ADAPTED_METHODS = (
    "sft",
    "adalora",
    "alignguard_lora",
    "ewc_lora",
    "l2_sp_lora",
    "olora",
    "clora",
    "oplora",
    "asft_lora",
    "salora",
    "lora_null",
)
"""Values of ``method.kind`` that can be trained through an adapter."""
REQUIRED_ADAPTERS = {
    "adalora": ("svd",),
    "alignguard_lora": ("lora",),
    "ewc_lora": ("lora",),
    "l2_sp_lora": ("lora",),
    "olora": ("lora",),
    "clora": ("lora",),
    "oplora": ("lora",),
    "asft_lora": ("lora",),
    "salora": ("lora",),
    "lora_null": ("lora",),
}
"""Methods that edit factors -> kinds of adapter they can do it with."""
Targets = Literal["all-linear"] | tuple[str, ...]
SVD_EPS = 1e-5


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
    target_modules: Targets = ALL_LINEAR
    """Last names of the linear layers to adapt, such as ``q_proj``, or longer ends of their names;
    ``all-linear`` takes all but the output head."""
    init: Literal["kaiming", "gaussian"] = "kaiming"
    """First values of ``A``: uniform in ``+-1 / sqrt(in features)``, or normal with deviation
    ``1 / rank``; drawn from ``run.seed``, the layer's name and the element's place. ``B`` is 0."""
    merge: bool = True
    """``train.export`` writes the merged model too; false writes the adapter folder alone."""

    def __post_init__(self) -> None:
        """Check ranges."""
        _check(self.rank, self.alpha, self.dropout, self.target_modules)

    @property
    def scale(self) -> float:
        """What ``B A`` is multiplied with."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


@dataclass(frozen=True, kw_only=True, slots=True)
class SvdAdapterConfig:
    """``W + scale * B diag(E) A``: the parametrisation of AdaLoRA (arXiv:2303.10512).

    ``A`` and ``B`` start as normal draws of deviation 0.02, ``E`` at 0.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    kind: Literal["svd"]
    rank: int = 12
    """Triplets of each matrix, > 0; ``method.kind: adalora`` takes some away."""
    alpha: float = 32.0
    """``scale`` is ``alpha / (rank + 1e-5)``, as in PEFT, and stays so when ranks shrink; > 0."""
    dropout: float = 0.0
    """As for ``lora``."""
    target_modules: Targets = ALL_LINEAR
    """As for ``lora``."""
    merge: bool = True
    """As for ``lora``."""

    def __post_init__(self) -> None:
        """Check ranges."""
        _check(self.rank, self.alpha, self.dropout, self.target_modules)

    @property
    def scale(self) -> float:
        """What ``B diag(E) A`` is multiplied with."""
        return self.alpha / (self.rank + SVD_EPS)

    @property
    def init(self) -> Literal["svd"]:
        """How factors start."""
        return "svd"


def _check(rank: int, alpha: float, dropout: float, target_modules: Targets) -> None:
    require(rank > 0, f"rank must be > 0, got {rank}")
    require(math.isfinite(alpha) and alpha > 0, f"alpha must be finite and > 0, got {alpha}")
    require(0 <= dropout < 1, f"dropout must lie in [0, 1), got {dropout}")
    require(
        target_modules == ALL_LINEAR or len(target_modules) > 0,
        "target_modules is empty, so nothing would be trained; name layers or say all-linear",
    )


AdapterConfig = Annotated[LoraAdapterConfig | SvdAdapterConfig, Discriminator("kind")]

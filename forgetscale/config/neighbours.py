"""Recipe sections of published methods on adapter factors, for comparisons."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import ConfigDict

from forgetscale.config.anchored import require_strength
from forgetscale.config.losses import CrossEntropyLossConfig, LossConfig
from forgetscale.config.ranges import STRICT, require


@dataclass(frozen=True, kw_only=True, slots=True)
class OloraMethodConfig:
    """O-LoRA (arXiv:2310.14152): ``A`` keeps off the rows of earlier tasks' ``A``.

    Earlier adapters are merged into the source model; their folders are named here.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    kind: Literal["olora"]
    loss: LossConfig = CrossEntropyLossConfig()
    """What is minimised; any loss goes with any protection."""
    strength: float = 0.5
    """Weight of the overlap, >= 0 (``lambda1``)."""
    form: Literal["published", "exact"] = "published"
    """``published`` sums absolute entries of ``A_i A^T``, as the code does; ``exact`` squares."""
    previous: tuple[Path, ...] = ()
    """Adapter folders (PEFT's format) of earlier tasks; none in the first task."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require_strength("strength", self.strength)


@dataclass(frozen=True, kw_only=True, slots=True)
class CloraMethodConfig:
    """CLoRA (arXiv:2410.16801): both factors keep off fixed random directions.

    The penalty is ``strength (||A P_A||^2 + ||B^T P_B||^2)``; the norm as the paper writes it could
    not be checked.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    kind: Literal["clora"]
    loss: LossConfig = CrossEntropyLossConfig()
    """What is minimised; any loss goes with any protection."""
    strength: float = 1.0
    """Weight of the penalty, >= 0."""
    num_directions: int = 8
    """Columns of each ``P``, > 0; at most the matrix's side. Drawn from ``run.seed``."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require_strength("strength", self.strength)
        require(self.num_directions > 0, f"num_directions must be > 0, got {self.num_directions}")


@dataclass(frozen=True, kw_only=True, slots=True)
class OploraMethodConfig:
    """OPLoRA (arXiv:2510.13003): the update keeps off the leading singular triples of ``W0``."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    kind: Literal["oplora"]
    loss: LossConfig = CrossEntropyLossConfig()
    """What is minimised; any loss goes with any protection."""
    num_directions: int = 16
    """Leading triples that stay exactly, > 0; at most half of a matrix's smaller side is taken."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require(self.num_directions > 0, f"num_directions must be > 0, got {self.num_directions}")

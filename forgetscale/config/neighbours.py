"""Recipe sections of published methods on adapter factors, for comparisons."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import ConfigDict

from forgetscale.config.anchored import require_strength
from forgetscale.config.calibration import CalibrationConfig
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


@dataclass(frozen=True, kw_only=True, slots=True)
class AsftLoraMethodConfig:
    """AsFT: the update stays inside the directions that alignment moved the weights along.

    With ``V = W_aligned - W_base`` the penalty is ``strength ||(I - C) dW||^2`` on the output side.
    AlignGuard believes the opposite: it keeps updates outside of sensitive directions.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    kind: Literal["asft_lora"]
    base: Path
    """Folder of the model before it was aligned, of the same shapes as ``model.path``."""
    loss: LossConfig = CrossEntropyLossConfig()
    """What is minimised; any loss goes with any protection."""
    strength: float = 1.0
    """Weight of the penalty, >= 0."""
    form: Literal["published", "exact"] = "published"
    """``published``: ``C = V V^T / ||V||``, which is no projector, on ``B A`` without the adapter's
    scale, as the code does; ``exact``: the projector onto the kept directions, on ``s B A``."""
    num_directions: int | None = None
    """Leading directions of each ``V`` that are kept, > 0; None keeps all. ``exact`` needs fewer
    than a matrix has outputs, or nothing is left to penalise."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require_strength("strength", self.strength)
        require(
            self.num_directions is None or self.num_directions > 0,
            f"num_directions must be > 0, got {self.num_directions}",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class SaloraMethodConfig:
    """SaLoRA (arXiv:2501.01765): the update does not reach what a layer says to safety data.

    The update is ``(I - U U^T) s B A`` with ``U`` the leading directions of ``W0 X`` over the
    calibration data. The task-informed start of the paper is not built: factors start as LoRA's.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    kind: Literal["salora"]
    calibration: CalibrationConfig
    """Safety data: unsafe prompts with refusals."""
    loss: LossConfig = CrossEntropyLossConfig()
    """What is minimised; any loss goes with any protection."""
    num_directions: int = 16
    """Directions of each layer's outputs that stay, > 0; at most half of its outputs are taken."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require(self.num_directions > 0, f"num_directions must be > 0, got {self.num_directions}")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraNullMethodConfig:
    """LoRA-Null: ``A`` starts as the input directions that source data hardly use.

    The second published variant: ``A`` are the weakest eigenvectors of the inputs' second moment,
    ``B`` is zero and the source weight stays whole. The first one moves a part of the source weight
    into the factors, so that the weight beside them would no longer be the source's bits.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    kind: Literal["lora_null"]
    calibration: CalibrationConfig
    """Source data: what must be kept."""
    loss: LossConfig = CrossEntropyLossConfig()
    """What is minimised; any loss goes with any protection."""
    freeze_a: bool = False
    """Put ``A`` back after every step: the update then never leaves those directions."""

"""Recipe sections of methods that hold the update of an adapter, ``s B A``, near zero.

All are measured on the update that is applied, never on the factors apart, which are only known up
to ``B R, R^-1 A``. They need ``adapter: {kind: lora}``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import ConfigDict

from forgetscale.config.anchored import (
    FisherBasisConfig,
    RefreshConfig,
    require_openings,
    require_source_of_basis,
    require_strength,
    require_targets,
)
from forgetscale.config.calibration import CalibrationConfig
from forgetscale.config.losses import CrossEntropyLossConfig, LossConfig
from forgetscale.config.ranges import STRICT, require, require_fraction

AdaptedAction = Literal["penalty", "prox", "project_update"]


@dataclass(frozen=True, kw_only=True, slots=True)
class CollisionConfig:
    """Terms that keep the alignment part of an update and the rest apart."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    strength: float = 0.1
    """Weight of both terms, >= 0. They are means over the elements of a matrix and over matrices,
    so they are small numbers beside a sum over directions."""
    alpha: float = 0.5
    """Share of the Riemannian term, in [0, 1]; the rest is the geodesic one."""
    beta: float = 5.0
    """Largest addition to an element's weight, >= 0."""
    tau: float = 0.01
    """Size of an update's element at which half of it is added, >= 0."""
    temperature: float = 1.0
    """Width of that rise, > 0. With the published 1 the weight hardly varies; try ``tau / 4``."""
    metric: Literal["none", "diagonal"] = "none"
    """Inner product of the geodesic term. Without one it is zero for every update, because the
    parts are orthogonal; ``diagonal`` takes the diagonal Fisher information."""

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("strength", "beta", "tau"):
            require_strength(name, getattr(self, name))
        require_fraction("alpha", self.alpha)
        require(self.temperature > 0, f"temperature must be > 0, got {self.temperature}")


@dataclass(frozen=True, kw_only=True, slots=True)
class AlignguardLoraMethodConfig:
    """AlignGuard-LoRA (arXiv:2508.02079), in a reading whose terms are not empty.

    The penalty is ``strength sum_i lam_i ||P_i x||^2 + task_strength ||x - P x||^2`` with ``x`` the
    update of a matrix and ``lam`` of model-wide mean 1.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    kind: Literal["alignguard_lora"]
    loss: LossConfig = CrossEntropyLossConfig()
    """What is minimised; any loss goes with any protection."""
    reading: Literal["vector", "left", "right", "two_sided"] = "left"
    """As for ``alignguard``. ``left`` and ``right`` never form the update."""
    action: AdaptedAction = "penalty"
    """``penalty`` adds its gradient to the factors' before the norm is taken; ``prox`` shrinks the
    update exactly after the optimizer's step, ``project_update`` takes the directions out of it:
    both on one factor alone, for ``left`` (``B``) and ``right`` (``A``)."""
    strength: float = 0.25
    """Weight of the alignment part, >= 0."""
    task_strength: float = 0.5
    """Weight of the rest, >= 0 (a ridge)."""
    collision: CollisionConfig | None = None
    """Collision terms (action ``penalty``, reading ``left`` or ``right``); None for none."""
    basis: Path | None = None
    """A finished Fisher basis; None measures one before training and keeps it in the run folder."""
    calibration: CalibrationConfig | None = None
    """Alignment data: unsafe and safe prompts with the source model's own answers."""
    fisher: FisherBasisConfig = FisherBasisConfig()
    """How the information is measured."""
    refresh: RefreshConfig | None = None
    """As for ``ewc``: measured at the source weights plus the update."""
    refusals: tuple[str, ...] | None = None
    """As for ``alignguard``."""
    target_modules: tuple[str, ...] | None = None
    """Adapted layers that are held, by last names; None holds all of them."""

    def __post_init__(self) -> None:
        """Check ranges and clashes."""
        require_strength("strength", self.strength)
        require_strength("task_strength", self.task_strength)
        require_targets(self.target_modules)
        require_source_of_basis(self)
        require_openings(self.refusals)
        one_sided = self.reading in ("left", "right")
        require(
            one_sided or self.action == "penalty",
            f"action {self.action} works on one factor, so reading must be left or right, got"
            f" {self.reading}",
        )
        require(
            self.collision is None or (one_sided and self.action == "penalty"),
            "collision is for action penalty and reading left or right, got"
            f" {self.action} and {self.reading}",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class EwcLoraMethodConfig:
    """EWC-LoRA (arXiv:2602.17559): ``lambda / 2 sum F x^2`` with ``x`` the update of a matrix."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    kind: Literal["ewc_lora"]
    loss: LossConfig = CrossEntropyLossConfig()
    """What is minimised; any loss goes with any protection."""
    strength: float = 1.0
    """``lambda`` with ``F`` of model-wide mean 1, >= 0."""
    basis: Path | None = None
    """As for ``alignguard_lora``."""
    calibration: CalibrationConfig | None = None
    """Data of what must be kept."""
    fisher: FisherBasisConfig = FisherBasisConfig()
    """How the information is measured."""
    refresh: RefreshConfig | None = None
    """As for ``ewc``: measured at the source weights plus the update."""
    target_modules: tuple[str, ...] | None = None
    """As for ``alignguard_lora``."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require_strength("strength", self.strength)
        require_targets(self.target_modules)
        require_source_of_basis(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class L2SpLoraMethodConfig:
    """L2-SP on the update: ``lambda / 2 ||s B A||^2``; decay of the factors is not the same."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    kind: Literal["l2_sp_lora"]
    loss: LossConfig = CrossEntropyLossConfig()
    """What is minimised; any loss goes with any protection."""
    strength: float = 0.01
    """``lambda``, >= 0."""
    target_modules: tuple[str, ...] | None = None
    """As for ``alignguard_lora``."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require_strength("strength", self.strength)
        require_targets(self.target_modules)

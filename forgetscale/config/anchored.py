"""Recipe sections of methods that hold weights near an anchor: penalties, shrinking, projections.

Which part of a change is held back is said by a Fisher basis (``basis`` or ``calibration``), by the
source weights themselves, or, for ``l2_sp``, by nothing: every change counts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict

from forgetscale.config.calibration import CalibrationConfig
from forgetscale.config.losses import CrossEntropyLossConfig, LossConfig
from forgetscale.config.ranges import STRICT, require, require_fraction

Structure = Literal["diagonal", "vector", "left", "right"]
Reading = Literal["vector", "left", "right", "two_sided", "mask"]
STRUCTURES_OF: dict[str, tuple[Structure, ...]] = {
    "vector": ("vector",),
    "left": ("left",),
    "right": ("right",),
    "two_sided": ("left", "right"),
    "mask": ("diagonal",),
}
"""Parts of a Fisher basis that each reading needs."""


def require_strength(name: str, value: float) -> None:
    """Raise ValueError unless ``value`` is finite and >= 0."""
    require(math.isfinite(value) and value >= 0, f"{name} must be finite and >= 0, got {value}")


def require_targets(names: tuple[str, ...] | None) -> None:
    """Raise ValueError for an empty list of target modules."""
    require(
        names is None or len(names) > 0,
        "target_modules is empty, so nothing would be held; name layers or leave it out",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class FisherBasisConfig:
    """How Fisher information is measured at the source weights."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    labels: Literal["sampled", "data"] = "sampled"
    """``sampled``: tokens drawn from the model's own predictions (true Fisher); ``data``: the next
    token of the text (empirical Fisher), which all but vanishes on answers the model is sure of."""
    blocks_per_sample: int = 1
    """Rows whose gradients are summed before they are squared, > 0. Ranks share them, so with one
    only one rank works at a time; sums of drawn labels are valid samples of their own."""
    explained: float = 0.9
    """Directions are kept until they explain this share of the trace, in (0, 1]."""
    max_rank: int = 32
    """Most directions kept of a matrix, > 0; of ``vector`` no more than there are samples."""
    structures: tuple[Structure, ...] = ()
    """Parts to measure beside those the method needs."""
    contrast: CalibrationConfig | None = None
    """General data: directions are kept that matter to the calibration data and not to these."""
    damping: float = 0.01
    """Share of the mean information of ``contrast`` added to it, > 0."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require(self.blocks_per_sample > 0, f"blocks_per_sample must be > 0, got {self}")
        require(0 < self.explained <= 1, f"explained must lie in (0, 1], got {self.explained}")
        require(self.max_rank > 0, f"max_rank must be > 0, got {self.max_rank}")
        require(self.damping > 0, f"damping must be > 0, got {self.damping}")


@dataclass(frozen=True, kw_only=True, slots=True)
class RefreshConfig:
    """Measuring Fisher information again while training goes on, at the weights of the moment.

    Changes are measured from the source weights for ever; only directions and values move. They
    become the mean of the first estimate's and the new one's, on the span of the first one and of
    what the new one holds beside it (at most ``fisher.max_rank`` directions more).
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    steps: int
    """Steps between two estimates, > 0."""
    calibration: CalibrationConfig | None = None
    """Held-out data of what must be kept; None takes the method's own calibration data."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require(self.steps > 0, f"steps must be > 0, got {self.steps}")


@dataclass(frozen=True, kw_only=True, slots=True)
class L2SpMethodConfig:
    """L2-SP: every change from the source weights costs the same (arXiv:1802.01483)."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    kind: Literal["l2_sp"]
    loss: LossConfig = CrossEntropyLossConfig()
    """What is minimised; any loss goes with any protection."""
    strength: float = 0.01
    """``lambda`` in ``lambda / 2 ||W - W0||^2``, >= 0."""
    action: Literal["penalty", "prox"] = "penalty"
    """``penalty`` adds the gradient before the norm is taken; ``prox`` shrinks the change after the
    optimizer's step, exactly and for any strength."""
    target_modules: tuple[str, ...] | None = None
    """Last names of modules, such as ``q_proj``, or longer ends; None holds every parameter."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require_strength("strength", self.strength)
        require_targets(self.target_modules)


def require_openings(openings: tuple[str, ...] | None) -> None:
    """Raise ValueError for a refusal without a word."""
    require(
        all(opening.strip() for opening in openings or ()),
        "refusals holds an empty text, which every answer opens with; remove it",
    )


def require_source_of_basis(section: Any) -> None:
    """Raise ValueError unless a basis is given or can be measured."""
    require(
        section.basis is not None or section.calibration is not None,
        f"{section.kind} needs Fisher information: set calibration.path to data of what must be"
        " kept, or basis to a finished one",
    )
    refresh: RefreshConfig | None = section.refresh
    require(
        refresh is None or refresh.calibration is not None or section.calibration is not None,
        "refresh measures on data: set refresh.calibration.path, or calibration.path",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class EwcMethodConfig:
    """EWC: a change costs as much as the diagonal Fisher information says (arXiv:1612.00796)."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    kind: Literal["ewc", "online_ewc"]
    """``online_ewc`` adds the information of earlier tasks, faded: ``F = gamma F_old + F_new``."""
    loss: LossConfig = CrossEntropyLossConfig()
    """What is minimised; any loss goes with any protection."""
    strength: float = 1.0
    """``lambda`` in ``lambda / 2 sum F (W - W0)^2`` with ``F`` of model-wide mean 1, >= 0."""
    action: Literal["penalty", "prox"] = "penalty"
    """As for ``l2_sp``."""
    basis: Path | None = None
    """A finished Fisher basis; None measures one before training and keeps it in the run folder."""
    calibration: CalibrationConfig | None = None
    """Data of what must be kept."""
    fisher: FisherBasisConfig = FisherBasisConfig()
    """How the information is measured."""
    refresh: RefreshConfig | None = None
    """Measure again while training goes on; None keeps the first estimate."""
    target_modules: tuple[str, ...] | None = None
    """As for ``l2_sp``."""
    previous: Path | None = None
    """Fisher basis of the earlier tasks (``online_ewc``): that of the run before this one; None in
    the first task."""
    gamma: float = 1.0
    """Share of the earlier information that stays, in [0, 1]."""

    def __post_init__(self) -> None:
        """Check ranges and clashes."""
        require_strength("strength", self.strength)
        require_fraction("gamma", self.gamma)
        require_targets(self.target_modules)
        require_source_of_basis(self)
        require(
            self.previous is None or (self.kind == "online_ewc" and self.basis is None),
            "previous is the basis of earlier tasks, for online_ewc where this task's is measured;"
            f" kind is {self.kind}, basis {self.basis}",
        )
        require(
            self.previous is None or self.refresh is None,
            "refresh forms the mean of estimates of one task, but previous adds up those of"
            " several; leave one of them out",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class AlignguardMethodConfig:
    """AlignGuard on full weights: directions that alignment relies on are held back.

    The penalty is ``strength sum_i lam_i ||P_i x||^2 + task_strength ||x - P x||^2`` with ``x`` the
    change from the source weights and ``lam`` of model-wide mean 1 (arXiv:2508.02079 for adapters).
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    kind: Literal["alignguard"]
    loss: LossConfig = CrossEntropyLossConfig()
    """What is minimised; any loss goes with any protection."""
    reading: Reading = "left"
    """What the directions are: of the flattened matrix (``vector``: the definition, and as large as
    that many weights), of outputs (``left``), inputs (``right``) or both (``two_sided``), or the
    ``mask_fraction`` of single elements with the most information."""
    action: Literal["penalty", "prox", "project_update"] = "project_update"
    """``project_update`` takes the directions out of every step; the others as for ``l2_sp``."""
    strength: float = 0.25
    """Weight of the alignment part, >= 0; not used by ``project_update``."""
    task_strength: float = 0.0
    """Weight of the rest, >= 0 (a ridge); not used by ``project_update``."""
    mask_fraction: float = 0.05
    """Share of each matrix's elements (``reading: mask``), in [0, 1]."""
    basis: Path | None = None
    """As for ``ewc``."""
    calibration: CalibrationConfig | None = None
    """Alignment data: unsafe and safe prompts with the source model's own answers."""
    fisher: FisherBasisConfig = FisherBasisConfig()
    """How the information is measured."""
    refresh: RefreshConfig | None = None
    """As for ``ewc``."""
    refusals: tuple[str, ...] | None = None
    """How answers of the alignment data open that refuse, ignoring case; data without one are
    turned down. None: openings of English refusals; an empty list does not look."""
    target_modules: tuple[str, ...] | None = None
    """Last names of linear layers; None holds all of the decoder body."""

    def __post_init__(self) -> None:
        """Check ranges and clashes."""
        require_strength("strength", self.strength)
        require_strength("task_strength", self.task_strength)
        require_fraction("mask_fraction", self.mask_fraction)
        require_openings(self.refusals)
        require_targets(self.target_modules)
        require_source_of_basis(self)
        require(
            self.action != "project_update" or self.task_strength == 0.0,
            "task_strength belongs to a penalty, but action project_update has none; set action to"
            " penalty or prox",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class OsfMethodConfig:
    """Orthogonal subspace fine-tuning: the leading singular triples of every matrix stay.

    Both sides of a change are projected off the leading singular vectors of the source weight,
    after the optimizer's step (as OPLoRA does for adapters, arXiv:2510.13003). The published OSF
    projects gradients, which Adam turns back into the subspace.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    kind: Literal["osf"]
    loss: LossConfig = CrossEntropyLossConfig()
    """What is minimised; any loss goes with any protection."""
    rank: int = 32
    """Leading triples of each matrix that stay, > 0; at most half of the smaller side is taken."""
    target_modules: tuple[str, ...] | None = None
    """As for ``alignguard``."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require(self.rank > 0, f"rank must be > 0, got {self.rank}")
        require_targets(self.target_modules)

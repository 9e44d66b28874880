"""Recipe sections of the methods: one frozen dataclass each, told apart by ``kind``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal, get_args

from pydantic import ConfigDict, Discriminator

from forgetscale.config.adapted import (
    AlignguardLoraMethodConfig,
    EwcLoraMethodConfig,
    L2SpLoraMethodConfig,
)
from forgetscale.config.anchored import (
    AlignguardMethodConfig,
    EwcMethodConfig,
    L2SpMethodConfig,
    OsfMethodConfig,
)
from forgetscale.config.calibration import CalibrationConfig
from forgetscale.config.losses import CrossEntropyLossConfig, LossConfig
from forgetscale.config.neighbours import (
    AsftLoraMethodConfig,
    CloraMethodConfig,
    LoraNullMethodConfig,
    OloraMethodConfig,
    OploraMethodConfig,
    SaloraMethodConfig,
)
from forgetscale.config.ranges import STRICT, require, require_fraction
from forgetscale.config.updates import MofoMethodConfig, SpdMethodConfig

ScoreName = Literal[
    "paper",
    "official",
    "mag_l1",
    "mag_l2",
    "rand",
    "fisher",
    "sgpt_true",
    "sgpt_official",
    "forgetscale",
]
SCORES: tuple[str, ...] = get_args(ScoreName)
DATA_SCORES = ("paper", "official", "fisher", "sgpt_true", "sgpt_official", "forgetscale")
"""Scores that are measured on source data."""
AXIS_SCORES = ("paper", "official", "mag_l1", "mag_l2", "rand")
"""Scores that are defined for rows and single elements as well as for columns."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FisherConfig:
    """How ``score: fisher`` is estimated: squared gradients of one block's mean loss."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    labels: Literal["data", "sampled"] = "data"
    """``data``: the next token of the text (empirical Fisher); ``sampled``: tokens drawn from the
    model's own predictions (true Fisher), the same for any number of ranks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SftMethodConfig:
    """Nothing is protected: full fine-tuning or plain continual pre-training."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    kind: Literal["sft"] = "sft"
    loss: LossConfig = CrossEntropyLossConfig()
    """What is minimised; any loss goes with any protection."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShieldRowsConfig:
    """Rows of the embedding and the output head chosen by what the target text uses."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    rule: Literal["unused_in_target"]
    """``unused_in_target``: tokens that occur fewer than ``min_count`` times in ``data.path``."""
    min_count: int = 1
    """Occurrences from which on a token counts as used, > 0; 1 shields what never occurs."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require(self.min_count > 0, f"min_count must be > 0, got {self.min_count}")


@dataclass(frozen=True, kw_only=True, slots=True)
class SsuMethodConfig:
    """Source-Shielded Updates: the most important input columns of each matrix never move."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    kind: Literal["ssu"]
    loss: LossConfig = CrossEntropyLossConfig()
    """What is minimised; any loss goes with any protection."""
    frozen_fraction: float = 0.5
    """Share of columns frozen in each matrix, in [0, 1]; 0 protects nothing, 1 freezes the body."""
    score: ScoreName = "paper"
    """Column score; see ``forgetscale.ops.importance.column_scores``. With ``forgetscale`` the
    fraction is a share of all matrices' elements: it ranks the columns of all of them together."""
    fisher: FisherConfig | None = None
    """Only for ``score: fisher``; None takes its defaults."""
    axis: Literal["column", "row", "element"] = "column"
    """What is frozen in a matrix: input columns, output rows, or single weights (as bits)."""
    scope: Literal["tensor", "global"] = "tensor"
    """Elements are ranked in each matrix alone, or over all matrices; ``axis: element`` only."""
    layout: Literal["compact", "masked"] = "compact"
    """``compact`` cuts matrices: no gradient, moments or weight-gradient matmul for what is frozen.
    ``masked`` keeps them whole and zeroes gradients of frozen elements. Same numbers."""
    vectors: Literal["elementwise", "train", "freeze"] = "elementwise"
    """1-D tensors of the decoder body: score each element, train all, or freeze all."""
    shield_token_ids: tuple[int, ...] = ()
    """Rows of the embedding and the output head that must not move, by token id."""
    shield_rows: ShieldRowsConfig | None = None
    """More such rows, chosen by the target text; None adds none."""
    plan: Path | None = None
    """A finished plan folder; None makes the plan from ``calibration`` before training."""
    calibration: CalibrationConfig | None = None
    """Source data for the scores; not needed by ``mag_l1``, ``mag_l2`` and ``rand``."""

    def __post_init__(self) -> None:
        """Check ranges and clashes."""
        require_fraction("frozen_fraction", self.frozen_fraction)
        require(
            self.fisher is None or self.score == "fisher",
            f"fisher is for score fisher, but score is {self.score}",
        )
        require(
            self.axis == "column" or self.score in AXIS_SCORES,
            f"score {self.score} is defined for axis column only, got {self.axis}; choose one of"
            f" {', '.join(AXIS_SCORES)}",
        )
        require(
            self.scope == "tensor" or self.axis == "element",
            f"scope global ranks single elements, so axis must be element, got {self.axis}",
        )
        needs_data = self.score in DATA_SCORES
        require(
            self.plan is not None or self.calibration is not None or not needs_data,
            f"score {self.score} needs source data: set calibration.path, or plan to reuse one",
        )
        require(
            all(token >= 0 for token in self.shield_token_ids),
            f"shield_token_ids must be >= 0, got {min(self.shield_token_ids, default=0)}",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class HftMethodConfig:
    """Half fine-tuning: whole matrices, drawn at random per layer, stay frozen."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    kind: Literal["hft"]
    loss: LossConfig = CrossEntropyLossConfig()
    """What is minimised; any loss goes with any protection."""
    frozen_fraction: float = 0.5
    """Share of each layer's parameters, in [0, 1]; 0.5 is the paper's, see ``group_counts``."""
    plan: Path | None = None
    """A finished plan folder; None draws the plan from ``run.seed``."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require_fraction("frozen_fraction", self.frozen_fraction)


@dataclass(frozen=True, kw_only=True, slots=True)
class FreezeLayersMethodConfig:
    """Layer freezing: only some layers at one end of the decoder are trained."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    kind: Literal["freeze_layers"]
    loss: LossConfig = CrossEntropyLossConfig()
    """What is minimised; any loss goes with any protection."""
    trainable_layers: int = 2
    """That many last layers are trained; below 0: that many first ones; not 0."""
    ends: Literal["train", "freeze"] = "freeze"
    """Embedding, output head and final norm."""
    plan: Path | None = None
    """A finished plan folder; None makes the plan."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require(self.trainable_layers != 0, "trainable_layers must not be 0: no layer would learn")


@dataclass(frozen=True, kw_only=True, slots=True)
class GmtMethodConfig:
    """Gradient-mask tuning: in each step only the largest gradients of each tensor count."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    kind: Literal["gmt", "gmt_official"]
    """``gmt`` holds masked weights still in that step; ``gmt_official`` is the published code."""
    loss: LossConfig = CrossEntropyLossConfig()
    """What is minimised; any loss goes with any protection."""
    trainable_fraction: float = 0.5
    """Share of each tensor's elements that a step may change, in [0, 1]; 1 is plain training."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require_fraction("trainable_fraction", self.trainable_fraction)


@dataclass(frozen=True, kw_only=True, slots=True)
class LotaMethodConfig:
    """Lottery ticket adaptation: only elements that a short trial moves most are trained."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    kind: Literal["lota"]
    loss: LossConfig = CrossEntropyLossConfig()
    """What is minimised; any loss goes with any protection."""
    trainable_fraction: float = 0.1
    """Share of the body's elements that may move, in [0, 1]; the paper's sparsity is 1 minus it."""
    num_trial_steps: int = 100
    """Optimizer steps of the trial on the target data, > 0."""
    trial_lr: float = 5.0e-5
    """Constant learning rate of the trial, > 0."""
    plan: Path | None = None
    """A finished plan folder; None runs the trial before training."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require_fraction("trainable_fraction", self.trainable_fraction)
        require(
            self.num_trial_steps > 0, f"num_trial_steps must be > 0, got {self.num_trial_steps}"
        )
        require(
            math.isfinite(self.trial_lr) and self.trial_lr > 0,
            f"trial_lr must be finite and > 0, got {self.trial_lr}",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class S2ftMethodConfig:
    """Structured sparse fine-tuning: only randomly drawn feed-forward channels are trained."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    kind: Literal["s2ft"]
    loss: LossConfig = CrossEntropyLossConfig()
    """What is minimised; any loss goes with any protection."""
    trainable_fraction: float = 0.015
    """Share of all layers' channels (and heads), in [0, 1]; at least one if above 0."""
    variant: Literal["down", "down_output"] = "down"
    """``down``: input columns of ``down_proj``; ``down_output``: whole heads of ``o_proj`` too."""
    ends: Literal["train", "freeze"] = "train"
    """Embedding and output head: trained, as in the published runs, or frozen."""
    layout: Literal["compact", "masked"] = "compact"
    """As for ``ssu``: cut matrices, or whole ones under masks. Same numbers."""
    plan: Path | None = None
    """A finished plan folder; None draws the plan from ``run.seed``."""

    def __post_init__(self) -> None:
        """Check ranges and clashes."""
        require_fraction("trainable_fraction", self.trainable_fraction)
        require(
            self.trainable_fraction > 0 or self.ends == "train",
            "trainable_fraction is 0 and ends is freeze, so nothing would be trained",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaloraMethodConfig:
    """AdaLoRA: factors of ``adapter.kind: svd`` lose the triplets that matter least."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    kind: Literal["adalora"]
    loss: LossConfig = CrossEntropyLossConfig()
    """What is minimised beside orthogonality."""
    target_rank: int = 8
    """Mean triplets a matrix keeps at the end, > 0; ``adapter.rank`` is where it starts."""
    shrink_from_step: int = 0
    """Up to this step every triplet is kept, >= 0 (``tinit`` of PEFT)."""
    shrink_until_step: int
    """At this step the budget reaches ``target_rank``; afterwards ranks stay. PEFT counts from the
    end: its ``tfinal`` is the total number of steps minus this."""
    interval: int = 1
    """Steps between two choices, > 0 (``deltaT`` of PEFT)."""
    sensitivity_beta: float = 0.85
    """Decay of the running mean of ``|weight * gradient|``, in (0, 1)."""
    uncertainty_beta: float = 0.85
    """Decay of the running mean of its deviation, in (0, 1)."""
    orthogonality: float = 0.5
    """Weight of the mean of ``||A A^T - I||`` and ``||B^T B - I||`` in the loss, >= 0."""

    def __post_init__(self) -> None:
        """Check ranges and clashes."""
        require(self.target_rank > 0, f"target_rank must be > 0, got {self.target_rank}")
        require(
            0 <= self.shrink_from_step < self.shrink_until_step,
            "shrink_from_step must be >= 0 and before shrink_until_step, got"
            f" {self.shrink_from_step} and {self.shrink_until_step}",
        )
        require(self.interval > 0, f"interval must be > 0, got {self.interval}")
        for name in ("sensitivity_beta", "uncertainty_beta"):
            value = getattr(self, name)
            require(0 < value < 1, f"{name} must lie in (0, 1), got {value}")
        require(
            math.isfinite(self.orthogonality) and self.orthogonality >= 0,
            f"orthogonality must be finite and >= 0, got {self.orthogonality}",
        )


MethodConfig = Annotated[
    SftMethodConfig
    | SsuMethodConfig
    | HftMethodConfig
    | FreezeLayersMethodConfig
    | GmtMethodConfig
    | LotaMethodConfig
    | S2ftMethodConfig
    | AdaloraMethodConfig
    | L2SpMethodConfig
    | EwcMethodConfig
    | AlignguardMethodConfig
    | OsfMethodConfig
    | AlignguardLoraMethodConfig
    | EwcLoraMethodConfig
    | L2SpLoraMethodConfig
    | OloraMethodConfig
    | CloraMethodConfig
    | OploraMethodConfig
    | AsftLoraMethodConfig
    | SaloraMethodConfig
    | LoraNullMethodConfig
    | SpdMethodConfig
    | MofoMethodConfig,
    Discriminator("kind"),
]

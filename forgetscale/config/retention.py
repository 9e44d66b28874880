"""The retention gate: how much of what the source model does a run may lose, and what follows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import ConfigDict

from forgetscale.config.ranges import STRICT, require

Action = Literal["warn", "lower_lr", "roll_back", "stop"]
ACTIONS: tuple[Action, ...] = ("warn", "lower_lr", "roll_back", "stop")
"""From the mildest to the strongest."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BudgetConfig:
    """How much one measure may get worse than at the source model."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    task: str
    """Task name, such as ``recall`` or ``perplexity/source``."""
    metric: str | None = None
    """Metric of the task; None takes its first (``accuracy``, ``perplexity``, ...)."""
    max_drop: float
    """Largest loss allowed, >= 0: source minus now, or now minus source where less is better."""
    kind: Literal["relative", "absolute"] = "relative"
    """Whether ``max_drop`` is a share of the source model's value or in the metric's own unit."""
    action: Action = "warn"
    """What happens above it."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require(self.task != "", "task must not be empty")
        require(
            math.isfinite(self.max_drop) and self.max_drop >= 0,
            f"max_drop must be >= 0 and finite, got {self.max_drop}",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RetentionConfig:
    """Measures of the source model's abilities while training, each with a budget."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    every_steps: int
    """Steps between measurements on the live model, > 0."""
    budgets: tuple[BudgetConfig, ...]
    """One or more; the strongest action of all that are exceeded is taken."""
    task_dir: Path | None = None
    """Folder of tasks; None takes ``evaluate.task_dir``."""
    batch_size: int = 8
    """Sequences per rank and forward pass, > 0."""
    max_rows: int | None = None
    """Rows used of each token set, > 0; None for all."""
    lr_factor: float = 0.5
    """What the learning rate is multiplied by when it is lowered, in (0, 1)."""
    after_roll_back: Literal["lower_lr", "stop"] = "lower_lr"
    """How a run goes on that was rolled back: at a lower rate, or not at all."""
    max_actions: int = 3
    """Times the rate may be lowered or the run rolled back, > 0; after that it stops."""

    def __post_init__(self) -> None:
        """Check ranges and clashes."""
        for name in ("every_steps", "batch_size", "max_rows", "max_actions"):
            value = getattr(self, name)
            require(value is None or value > 0, f"{name} must be > 0, got {value}")
        require(0 < self.lr_factor < 1, f"lr_factor must lie in (0, 1), got {self.lr_factor}")
        require(bool(self.budgets), "budgets must name at least one task")
        named = [(budget.task, budget.metric, budget.action) for budget in self.budgets]
        twice = [item for item in named if named.count(item) > 1]
        require(not twice, f"budgets name {twice[:1]} twice; one budget per measure and action")

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks that are measured, each once, in the order of the budgets."""
        return tuple(dict.fromkeys(budget.task for budget in self.budgets))

    @property
    def rolls_back(self) -> bool:
        """Whether a budget may send the run back to an earlier checkpoint."""
        return any(budget.action == "roll_back" for budget in self.budgets)

"""What is written down of a checkpoint beside the states: where the run stands, what it cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class RunState:
    """Where a run stands; together with the ranks' states it is all that resume needs."""

    step: int
    """Optimizer steps done, skipped ones among them."""
    cursor: int
    """Rows of the stream consumed by all ranks."""
    target_tokens: int
    """Target tokens seen by all ranks."""
    world_size: int
    """Ranks that wrote the checkpoint."""
    data_hash: str
    """Content hash of the token set."""
    plan_hash: str | None
    """Content hash of the freeze plan."""
    model_hash: str
    """Content hash of the source model."""
    guard: Mapping[str, Any] = field(default_factory=dict)
    """What the guard against bad steps remembers; JSON."""


@dataclass(frozen=True, slots=True)
class SaveReport:
    """What a published checkpoint cost."""

    step: int
    num_bytes: int
    """Masters and moments of all ranks."""
    in_background: bool
    """False: training waited for the whole of it."""
    stall_seconds: float
    """Training stood still this long for it, waiting for the save before it not counted."""
    total_seconds: float
    """From the beginning of the save until it was published."""
    waited_seconds: float
    """Training stood still this long, because the save before it had not ended."""

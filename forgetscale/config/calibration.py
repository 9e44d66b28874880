"""Recipe section of source data: what importance and Fisher information are measured on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pydantic import ConfigDict

from forgetscale.config.ranges import STRICT, require


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationConfig:
    """Source data on which importance is measured."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    path: Path
    """Token set of source chats (``data_prep build --chat``)."""
    num_blocks: int = 500
    """Rows used, at equal strides over the set, > 0."""
    micro_batch_size: int = 1
    """Rows per forward pass, > 0. Part of the plan's identity: it fixes how matmuls are cut."""

    max_statistics_bytes: int = 2**33
    """Memory per rank for sums of outer products of inputs (``score: sgpt_true``), > 0; with less
    than all of them need, the data are passed through the model several times."""

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("num_blocks", "micro_batch_size", "max_statistics_bytes"):
            value = getattr(self, name)
            require(value > 0, f"{name} must be > 0, got {value}")

"""Recipe sections of training data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import ConfigDict

from forgetscale.config.ranges import STRICT


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenDataConfig:
    """Training text: a token set made by ``python -m data_prep build``."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    kind: Literal["tokens"] = "tokens"
    """Rows of packed tokens; every position but the last is a target."""
    path: Path
    """Token set folder."""
    shuffle_seed: int = 42
    """Seed of the row order, >= 0."""

"""Range checks of recipe sections, and how strict they are."""

from __future__ import annotations

from pydantic import ConfigDict

STRICT = ConfigDict(extra="forbid", str_strip_whitespace=True)
"""Unknown keys are refused."""


def require(condition: bool, sentence: str) -> None:
    """Raise ValueError with ``sentence`` unless ``condition`` holds."""
    if not condition:
        raise ValueError(sentence)


def require_fraction(name: str, value: float) -> None:
    """Raise ValueError unless ``value`` lies in [0, 1]."""
    require(0.0 <= value <= 1.0, f"{name} must lie in [0, 1], got {value}")

"""Recipe sections of training data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Discriminator, Tag

from forgetscale.config.ranges import STRICT, require

MAX_PERIOD = 1 << 16
"""Longest pattern of a mixture, in rows; after it every share is exact and the pattern repeats."""


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
    document_mask: bool = False
    """Documents of a row do not see each other: attention stops at their borders, positions
    restart, and the first token of a document is no target. False: the paper's way, a row is one
    text."""
    skip_rows: Path | None = None
    """JSON lines ``{"row": 17, "reason": "..."}``: rows that are never trained on. The run copies
    them to its own ``skip_list.jsonl``, where they stay whatever becomes of this file."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require(self.shuffle_seed >= 0, f"shuffle_seed must be >= 0, got {self.shuffle_seed}")


@dataclass(frozen=True, kw_only=True, slots=True)
class SftDataConfig:
    """Training conversations: SFT rows made by ``python -m data_prep build --sft``."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    kind: Literal["sft"]
    """Rows of packed conversations; the assistant's tokens are the targets."""
    path: Path
    """Folder of the rows."""
    shuffle_seed: int = 42
    """Seed of the row order, >= 0."""
    document_mask: bool = True
    """Conversations of a row do not see each other."""
    skip_rows: Path | None = None
    """As for a token set: rows that are never trained on."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require(self.shuffle_seed >= 0, f"shuffle_seed must be >= 0, got {self.shuffle_seed}")


@dataclass(frozen=True, kw_only=True, slots=True)
class MixtureSetConfig:
    """One token set of a mixture."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    kind: Literal["tokens", "sft"] = "tokens"
    """Plain tokens, or SFT rows."""
    path: Path
    """Token set folder; all sets of a mixture have the same row length."""
    weight: float
    """Share of this set in proportion to the other weights, > 0; taken as the decimal written."""
    shuffle_seed: int | None = None
    """Seed of this set's row order, >= 0; None takes the mixture's."""
    name: str | None = None
    """Name in metrics; None takes the folder's."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require(
            math.isfinite(self.weight) and self.weight > 0,
            f"weight must be > 0, got {self.weight}; leave the set out instead",
        )
        require(
            self.shuffle_seed is None or self.shuffle_seed >= 0,
            f"shuffle_seed must be >= 0, got {self.shuffle_seed}",
        )

    @property
    def shown_name(self) -> str:
        """Name in metrics and messages."""
        return self.path.name if self.name is None else self.name


@dataclass(frozen=True, kw_only=True, slots=True)
class MixtureDataConfig:
    """Several token sets in fixed proportions, each going through its own epochs."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    kind: Literal["mixture"]
    """Rows of several token sets."""
    sets: tuple[MixtureSetConfig, ...]
    """The token sets, at least one."""
    unit: Literal["rows", "tokens", "targets", "sequences"] = "rows"
    """What the weights are shares of: each is divided by what the set has of it in a row on
    average. ``targets`` are target tokens, ``sequences`` documents or conversations."""
    shuffle_seed: int = 42
    """Seed of the row orders, >= 0."""
    document_mask: bool = None  # type: ignore[assignment]
    """As for one set: documents of a row do not see each other. Not given: true if a set holds SFT
    rows, else false."""
    skip_rows: Path | None = None
    """As for one set; here each line also names its set by content hash: ``"set": "3f9a..."``."""

    def __post_init__(self) -> None:
        """Check ranges and clashes."""
        require(len(self.sets) >= 1, "sets must hold at least one token set")
        if self.document_mask is None:
            has_sft = any(part.kind == "sft" for part in self.sets)
            object.__setattr__(self, "document_mask", has_sft)
        require(self.shuffle_seed >= 0, f"shuffle_seed must be >= 0, got {self.shuffle_seed}")
        names = [part.shown_name for part in self.sets]
        twice = [name for name in names if names.count(name) > 1]
        require(not twice, f"two sets are called {twice[:1]}; give them a name each")
        paths = [part.path for part in self.sets]
        again = [str(path) for path in paths if paths.count(path) > 1]
        require(not again, f"sets hold {again[:1]} twice; give one the sum of the weights")
        period = sum(whole_shares([part.weight for part in self.sets]))
        require(
            period <= MAX_PERIOD,
            f"weights come out even only after {period} rows, at most {MAX_PERIOD} are allowed;"
            " write them with fewer digits",
        )


def whole_shares(weights: Sequence[float | Fraction]) -> tuple[int, ...]:
    """Return the smallest whole numbers in the proportion of ``weights``.

    A float counts as the decimal it prints as: 0.1 is one tenth.

    Args:
        weights: Each > 0.
    """
    exact = [item if isinstance(item, Fraction) else Fraction(str(item)) for item in weights]
    scale = math.lcm(*(item.denominator for item in exact))
    whole = [int(item * scale) for item in exact]
    common = math.gcd(*whole)
    return tuple(item // common for item in whole)


def _kind(value: Any) -> str | None:
    """Return which section ``value`` is; one without ``kind`` is a plain token set."""
    if isinstance(value, Mapping):
        kind = value.get("kind", "tokens")
    else:
        kind = getattr(value, "kind", None)
    return None if kind is None else str(kind)


DataConfig = Annotated[
    Annotated[TokenDataConfig, Tag("tokens")]
    | Annotated[SftDataConfig, Tag("sft")]
    | Annotated[MixtureDataConfig, Tag("mixture")],
    Discriminator(_kind),
]

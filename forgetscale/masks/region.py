"""Which tensors an edit of weights may touch, by name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from forgetscale.errors import ConfigError

LAYERS, NORMS = "layers", "norm"


@dataclass(frozen=True, slots=True)
class Region:
    """Which tensors an edit may touch, by regular expressions searched in their names."""

    include: str
    exclude: str = ""

    def __post_init__(self) -> None:
        for name, text in (("include", self.include), ("exclude", self.exclude)):
            try:
                re.compile(text)
            except re.error as error:
                raise ConfigError(f"{name} {text!r} is no regular expression: {error}.") from error

    def holds(self, name: str) -> bool:
        """Say whether a tensor of this name belongs to the region."""
        if not re.search(self.include, name):
            return False
        return not (self.exclude and re.search(self.exclude, name))


def default_region(names: Sequence[str]) -> Region:
    """Return the paper's region: decoder layers without norms; all tensors where none has layers.

    Source:
        Official code of arXiv:2509.16596, region ``transformer``.
    """
    if any(re.search(LAYERS, name) for name in names):
        return Region(LAYERS, NORMS)
    return Region(".")

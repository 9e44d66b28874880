"""Folders a run may touch: every path of a recipe must lie below one of them, links resolved."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from forgetscale.errors import ConfigError


def paths_of(section: Any, name: str = "") -> Iterator[tuple[str, Path]]:
    """Return every path of a recipe with the name of its field.

    Args:
        section: Recipe, or a part of one.
        name: What stands before the names.
    """
    if isinstance(section, Path):
        yield name, section
    elif dataclasses.is_dataclass(section):
        for field in dataclasses.fields(section):
            here = f"{name}.{field.name}" if name else field.name
            yield from paths_of(getattr(section, field.name), here)
    elif isinstance(section, Mapping):
        for key, value in section.items():
            yield from paths_of(value, f"{name}.{key}")
    elif isinstance(section, list | tuple):
        for number, value in enumerate(section):
            yield from paths_of(value, f"{name}[{number}]")


def require_roots(recipe: Any, roots: Sequence[Path], where: str) -> None:
    """Check that every path of a recipe lies below one of some folders.

    Args:
        recipe: Resolved recipe.
        roots: Folders; none allows everything.
        where: Who named them, for the message.

    Raises:
        ConfigError: A path lies outside, by ``..`` or by a link; the message names its field.
    """
    if not roots:
        return
    allowed = [Path(root).resolve() for root in roots]
    for name, path in paths_of(recipe):
        if name == "roots" or name.startswith("roots["):
            continue
        found = path.resolve()
        if not any(found.is_relative_to(root) for root in allowed):
            shown = ", ".join(str(root) for root in allowed)
            raise ConfigError(
                f"{name} is {path}, which is {found} and lies below none of the folders that"
                f" {where} allows ({shown}); move it there, or name its folder too."
            )

"""Which matrices a recipe's ``target_modules`` mean."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from forgetscale.errors import ConfigError
from forgetscale.methods.ssu.targets import Target, find_targets


def matches(module: str, names: Sequence[str]) -> bool:
    """Return whether a module's name ends with one of the names, at a dot."""
    return any(module == name or module.endswith(f".{name}") for name in names)


def match_targets(structure: Any, names: Sequence[str] | None) -> list[Target]:
    """Return the matrices of linear layers of the decoder body that a recipe names.

    Args:
        structure: Hugging Face causal language model (meta tensors will do).
        names: Last names of modules, or longer ends; None takes all.

    Raises:
        ConfigError: A name matches no linear layer.
    """
    found = [target for target in find_targets(structure) if not target.is_vector]
    if names is None:
        return found
    for name in names:
        if not any(matches(target.module, [name]) for target in found):
            ends = sorted({target.module.rpartition(".")[2] for target in found})
            near = difflib.get_close_matches(name.rpartition(".")[2], ends, n=1)
            hint = near[0] if near else ", ".join(ends)
            raise ConfigError(
                f"method.target_modules names {name!r}, but no linear layer of the model ends with"
                f" it; nearest: {hint}."
            )
    return [target for target in found if matches(target.module, names)]


def held_names(structure: Any, names: Sequence[str] | None) -> list[str]:
    """Return the parameters that ``target_modules`` mean where any parameter can be held.

    Args:
        structure: Hugging Face causal language model.
        names: As in ``match_targets``; None takes every parameter.

    Raises:
        ConfigError: A name matches no linear layer.
    """
    if names is None:
        return [name for name, _ in structure.named_parameters()]
    return [target.name for target in match_targets(structure, names)]

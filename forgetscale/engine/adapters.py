"""Which matrices of the source model a recipe's adapter stands beside."""

from __future__ import annotations

from typing import Any

from forgetscale.config import Recipe
from forgetscale.masks import AdapterPair
from forgetscale.models import adapter_pairs


def find_adapters(recipe: Recipe, skeleton: Any) -> dict[str, AdapterPair]:
    """Return the factor pairs that the recipe asks for, {} without an adapter.

    Args:
        recipe: Resolved recipe.
        skeleton: Source model on the meta device.

    Raises:
        ConfigError: ``adapter.target_modules`` fits no layer, or the rank is too large.
    """
    section = recipe.adapter
    if section is None:
        return {}
    return adapter_pairs(
        skeleton,
        section.target_modules,
        rank=section.rank,
        scale=section.scale,
        dropout=section.dropout,
        has_values=section.kind == "svd",
    )

"""The run folder: one recipe's run, started or resumed, never two runs mixed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from forgetscale.artifact import provenance, write_json
from forgetscale.config import Recipe, dump_recipe, read_yaml, recipe_dict
from forgetscale.errors import ConfigError

RECIPE_FILE = "recipe.yaml"
_MAY_CHANGE = (
    "run.name",
    "run.output_dir",
    "train.checkpoint_every_steps",
    "train.keep_checkpoints",
    "train.audit_every_steps",
    "train.export",
    "evaluate.",
)
_MAY_STAND_BEFORE = {"results", "plan", "log.txt", "logs"}
_WORK = ("plan", "metrics.jsonl", "checkpoints", "export", "results")


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def first_difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Return a phrase for the first field that matters and differs, or None."""
    old, new = dict(_leaves(before)), dict(_leaves(now))
    for name in [*new, *(name for name in old if name not in new)]:
        if name.startswith(_MAY_CHANGE):
            continue
        if old.get(name) != new.get(name):
            return f"{name} is {old.get(name)!r} there and {new.get(name)!r} here"
    return None


def open_run_folder(recipe: Recipe) -> bool:
    """Create the run folder, or check that it holds this recipe's run.

    Call on one process only.

    Returns:
        True if a run was started here before.

    Raises:
        ConfigError: The folder holds another recipe's run or something that is no run.
    """
    directory = recipe.run.output_dir
    stored = directory / RECIPE_FILE
    if stored.is_file():
        difference = first_difference(read_yaml(stored), recipe_dict(recipe))
        worked = any((directory / name).exists() for name in _WORK)
        if difference is not None and worked:
            raise ConfigError(
                f"run.output_dir {directory} holds another recipe's run ({difference}); choose"
                " another folder or remove this one."
            )
        if difference is None:
            return True
        # A start that failed before any work, and the recipe was corrected since.
    elif directory.exists():
        foreign = sorted(set(os.listdir(directory)) - _MAY_STAND_BEFORE)
        if foreign:
            raise ConfigError(
                f"run.output_dir {directory} holds {foreign[0]!r} but no {RECIPE_FILE}; it is not"
                " a run folder, choose another."
            )
    directory.mkdir(parents=True, exist_ok=True)
    temporary = directory / f".{RECIPE_FILE}.tmp"
    temporary.write_text(dump_recipe(recipe), encoding="utf-8")
    temporary.replace(stored)
    write_json(directory / "made_by.json", provenance(recipe_dict(recipe)))
    return False

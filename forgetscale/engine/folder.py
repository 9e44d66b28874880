"""The run folder: one recipe's run, started or resumed, never two runs mixed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

from forgetscale.artifact import provenance, recorded_environment, write_json
from forgetscale.config import Recipe, dump_recipe, read_yaml, recipe_dict
from forgetscale.config.deepspeed import read_deepspeed
from forgetscale.errors import ConfigError

RECIPE_FILE = "recipe.yaml"
DEEPSPEED_FILE = "deepspeed.json"
_MAY_CHANGE = (
    "run.name",
    "run.output_dir",
    "data.skip_rows",
    "method.layout",
    "method.loss.reference.cache",
    "train.micro_batch_size",
    "train.checkpoint_every_steps",
    "train.checkpoint_mode",
    "train.keep_checkpoints",
    "train.audit_every_steps",
    "train.watchdog_s",
    "train.export",
    "evaluate.",
    "retention",
    "guard.",
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


def check_run_folder(recipe: Recipe) -> None:
    """Check that the run folder is free or holds this recipe's run; writes nothing.

    Raises:
        ConfigError: The folder holds another recipe's run or something that is no run.
    """
    directory = recipe.run.output_dir
    stored = directory / RECIPE_FILE
    if stored.is_file():
        difference = first_difference(read_yaml(stored), recipe_dict(recipe))
        kept = directory / DEEPSPEED_FILE
        if difference is None and kept.is_file():
            if json.loads(kept.read_bytes()) != read_deepspeed(recipe.deepspeed):
                difference = f"the content of {recipe.deepspeed} has changed since"
        # Without work in it a folder is a start that failed; its recipe may be corrected.
        if difference is not None and any((directory / name).exists() for name in _WORK):
            raise ConfigError(
                f"run.output_dir {directory} holds another recipe's run ({difference}); choose"
                " another folder or remove this one."
            )
    elif directory.exists():
        names = {name for name in os.listdir(directory) if not name.startswith(".")}
        if foreign := sorted(names - _MAY_STAND_BEFORE):
            raise ConfigError(
                f"run.output_dir {directory} holds {foreign[0]!r} but no {RECIPE_FILE}; it is not"
                " a run folder, choose another."
            )


def open_run_folder(recipe: Recipe) -> bool:
    """Create the run folder with the resolved recipe, or find this recipe's run in it.

    Call on one process only.

    Returns:
        True if this recipe was started here before.

    Raises:
        ConfigError: The folder holds another recipe's run or something that is no run.
    """
    check_run_folder(recipe)
    directory = recipe.run.output_dir
    stored = directory / RECIPE_FILE
    if stored.is_file() and first_difference(read_yaml(stored), recipe_dict(recipe)) is None:
        return True
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / DEEPSPEED_FILE, read_deepspeed(recipe.deepspeed))
    made_by = provenance(recipe_dict(recipe)) | {"environment": recorded_environment()}
    write_json(directory / "made_by.json", made_by)
    temporary = directory / f".{RECIPE_FILE}.tmp"
    temporary.write_text(dump_recipe(recipe), encoding="utf-8")
    temporary.replace(stored)
    return False

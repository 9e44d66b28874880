"""What a run folder remembers of its training data: the sets they were, the rows it skips."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from forgetscale.artifact import write_json
from forgetscale.checkpoint import RunState
from forgetscale.config import Recipe
from forgetscale.data import (
    SKIP_LIST_FILE,
    SkipList,
    TrainingData,
    data_difference,
    read_skips,
    settle_skips,
)
from forgetscale.errors import ConfigError
from forgetscale.zero3 import World

DATA_FILE = "data.json"


def keep_data_record(run_folder: Path, data: TrainingData) -> None:
    """Write down what the run is trained on, unless it stands there. Call on one process only."""
    path = run_folder / DATA_FILE
    if path.is_file() and json.loads(path.read_bytes())["content_hash"] == data.content_hash:
        return
    write_json(path, data.record())


def require_same_data(
    checkpoint: Path, data_hash: str, run_folder: Path, data: TrainingData
) -> None:
    """Refuse to resume on other data than a checkpoint was made with.

    Args:
        checkpoint: The checkpoint, for the message.
        data_hash: Content hash it was made with.
        run_folder: Holds the record of the data, if the run got far enough to write it.
        data: The data of today.

    Raises:
        ConfigError: The data changed; the sentence names the sets and the fields that differ.
    """
    if data_hash == data.content_hash:
        return
    path = run_folder / DATA_FILE
    record = json.loads(path.read_bytes()) if path.is_file() else {}
    if record.get("content_hash") == data_hash:
        difference = data_difference(record, data.record())
    else:
        difference = f"content hash was {data_hash[:12]}, is {data.content_hash[:12]}"
    raise ConfigError(
        f"{checkpoint} was made with other training data ({difference}); put the old data back or"
        " start a new run.output_dir."
    )


def settle_run_skips(
    recipe: Recipe, world: World, data: TrainingData, state: RunState, log: Callable[[str], None]
) -> SkipList:
    """Return the rows this run skips, the same on every rank.

    Collective: every rank must call it.

    Raises:
        DataError: A skip list cannot be read or does not fit the data.
    """
    folder, given = recipe.run.output_dir, recipe.data.skip_rows
    entries = world.on_main(
        lambda: settle_skips(data, folder, given, step=state.step, cursor=state.cursor).entries
    )
    skips = SkipList(data, entries)
    if len(skips):
        log(f"skip list: {len(skips)} rows keep their place and carry no target")
    return skips


def read_run_skips(recipe: Recipe, data: TrainingData) -> SkipList:
    """Return what a run of the recipe would skip today; writes nothing.

    Raises:
        DataError: A skip list cannot be read or does not fit the data.
    """
    ledger = recipe.run.output_dir / SKIP_LIST_FILE
    skips = SkipList(data, read_skips(ledger) if ledger.is_file() else ())
    if recipe.data.skip_rows is None:
        return skips
    only = data.parts[0].token_set.content_hash if len(data.parts) == 1 else None
    return skips.with_entries(read_skips(recipe.data.skip_rows, only_set=only))

"""``forgetscale check --data``: are the training data whole, and is every row delivered once?"""

from __future__ import annotations

import time

from forgetscale.config import Recipe
from forgetscale.data import TrainingData, open_data
from forgetscale.data.order import RowOrder
from forgetscale.data.replay import check_epoch, replay_schedules
from forgetscale.engine.data_state import read_run_skips
from forgetscale.errors import ConfigError, DataError, ForgetScaleError

NUM_EPOCHS = 2


def check_data(recipe: Recipe, schedules: int) -> None:
    """Check the data of a recipe and print what was found. Call on one process.

    Raises:
        ConfigError: ``schedules`` is below 1.
        DataError: A token set is missing, damaged or made with another tokenizer.
        ForgetScaleError: A row is lost or repeated, or a batch depends on the rank count.
    """
    if schedules < 1:
        raise ConfigError(f"--schedules must be >= 1, got {schedules}")
    data = open_data(recipe.data, recipe.model.path)
    skips = read_run_skips(recipe, data)
    for part in data.parts:
        token_set = part.token_set
        print(
            f"{part.name}: {token_set.num_rows:,} rows of {token_set.block_size:,} tokens,"
            f" share {part.share}, content hash {token_set.content_hash[:16]}"
        )
    if len(skips):
        print(f"skip list: {len(skips):,} rows keep their place and carry no target")
    _check_bytes(data)
    faults = _check_epochs(recipe, data)
    start = time.perf_counter()
    seed = recipe.data.shuffle_seed
    found = replay_schedules(
        lambda: data.order(seed),
        num_rows=data.num_rows,
        global_batch_size=recipe.train.global_batch_size,
        schedules=schedules,
        seed=recipe.run.seed,
        skips=skips,
    )
    print(
        f"replay: {found.schedules:,} schedules over 1 to 8 ranks with changes of batch size,"
        f" {found.interruptions:,} interruptions, {found.rows:,} rows:"
        f" {found.lost:,} lost, {found.repeated:,} repeated;"
        f" {found.batches:,} global batches compared, {found.different:,} different"
        f" ({time.perf_counter() - start:.1f} s)",
        flush=True,
    )
    if faults or not found.exact:
        raise ForgetScaleError(
            f"the order of rows is not exact ({faults} rows wrong in whole epochs, {found.lost}"
            f" lost, {found.repeated} repeated and {found.different} batches different in replays);"
            " this is a fault of the program, do not train with it."
        )


def _check_bytes(data: TrainingData) -> None:
    """Hash every byte of every set."""
    for part in data.parts:
        start = time.perf_counter()
        damages = list(part.token_set.damages())
        for sentence in damages:
            print(sentence)
        print(
            f"{part.name}: {len(damages)} damaged places ({time.perf_counter() - start:.1f} s)",
            flush=True,
        )
        if damages:
            raise DataError(
                f"{part.token_set.path} is damaged (damaged places: {len(damages)}, listed above);"
                " copy it again or build it again."
            )


def _check_epochs(recipe: Recipe, data: TrainingData) -> int:
    """Walk whole epochs of each set; return how many rows are wrong."""
    wrong = 0
    for part in data.parts:
        token_set = part.token_set
        seed = recipe.data.shuffle_seed if part.seed is None else part.seed
        order = RowOrder(token_set.num_rows, token_set.content_hash, seed)
        for epoch in range(NUM_EPOCHS):
            found = check_epoch(order.rows, token_set.num_rows, name=part.name, epoch=epoch)
            wrong += found.missing + found.repeated
            print(
                f"{part.name}: epoch {epoch}, {token_set.num_rows:,} rows: {found.missing:,}"
                f" missing, {found.repeated:,} repeated",
                flush=True,
            )
    return wrong

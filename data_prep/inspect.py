"""``inspect``: which documents a row, or any training step of any rank, holds.

The rows of a step are a pure function of the data, the seed, the batch size and the skip list, so
nothing is recorded during training and nothing has to be replayed.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from forgetscale.errors import ConfigError

if TYPE_CHECKING:
    from forgetscale.data import SkipList, TrainingData

EXAMPLES = """examples:
  python -m data_prep inspect data/am-512 --row 0
  python -m data_prep inspect data/am-512 --row 41 --tokenizer models/OLMo-2-1124-7B-Instruct

  what step 1234 of a run saw, and what rank 3 of 8 saw of it:
    python -m data_prep inspect --run runs/am-ssu --step 1234
    python -m data_prep inspect --run runs/am-ssu --step 1234 --rank 3 --world-size 8

  the same without a run folder:
    python -m data_prep inspect data/am-512 --step 1234 --global-batch-size 32 --seed 42"""


@dataclass(frozen=True, slots=True)
class SeenRow:
    """One row of a step."""

    rank: int
    set_id: int
    """Position of its set in the training data."""
    row: int
    skipped: bool
    """It kept its place but carried no target."""


def rows_of_step(
    data: TrainingData,
    step: int,
    *,
    seed: int,
    global_batch_size: int,
    world_size: int = 1,
    skips: SkipList | None = None,
) -> list[SeenRow]:
    """Return the rows of a training step in the order of the global batch.

    Args:
        data: The run's training data.
        step: Step number, first = 1.
        seed: Seed of the row order.
        global_batch_size: Rows a step over all ranks, >= 1.
        world_size: Ranks that shared the batch; it decides ``rank`` of each row, not the rows.
        skips: The run's skip list, or None.

    Raises:
        ConfigError: A number is out of range.
    """
    from forgetscale.data.stream import RowStream

    if step < 1:
        raise ConfigError(f"--step must be >= 1 (the first step is 1), got {step}.")
    if world_size < 1:
        raise ConfigError(f"--world-size must be >= 1, got {world_size}.")

    def open_rank(rank: int, ranks: int, cursor: int) -> RowStream:
        return RowStream(
            data.order(seed),
            skips,
            global_batch_size=global_batch_size,
            rank=rank,
            world_size=ranks,
            cursor=cursor,
        )

    start = (step - 1) * global_batch_size
    if skips is not None and len(skips):
        # A global batch without a target is passed over, so steps are counted.
        stream = open_rank(0, 1, 0)
        for _ in range(step - 1):
            next(stream)
        start = stream.cursor
    seen = []
    for rank in range(world_size):
        share = next(open_rank(rank, world_size, start))
        columns = (share.set_ids.tolist(), share.row_ids.tolist(), share.skipped.tolist())
        seen += [SeenRow(rank, *row) for row in zip(*columns, strict=True)]
    return seen


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``inspect``."""
    add = parser.add_argument
    add("directory", type=Path, nargs="?", metavar="DIR", help="token set folder")
    add("--row", type=int, metavar="N", help="show this row; first = 0")
    add("--step", type=int, metavar="N", help="show the rows of this training step; first = 1")
    add("--run", dest="run_folder", type=Path, metavar="RUN", help="run folder the step is of")
    add("--rank", type=int, metavar="R", help="only this rank's rows; first = 0 (default: all)")
    add("--world-size", type=int, metavar="W", help="ranks of the run (default 1)")
    add("--global-batch-size", type=int, metavar="G", help="rows a step, without --run")
    add("--seed", type=int, metavar="S", help="data.shuffle_seed, without --run (default 42)")
    add(
        "--tokenizer",
        type=Path,
        metavar="DIR",
        help="decode with this tokenizer (default: the folder the set was built with)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print what was asked for.

    Raises:
        ConfigError: Options clash.
    """
    if (args.row is None) == (args.step is None):
        raise ConfigError("inspect: give exactly one of --row and --step.")
    if (args.directory is None) == (args.run_folder is None):
        raise ConfigError("inspect: give exactly one of a token set folder and --run.")
    if args.row is not None:
        return _show_row(args)
    return _show_step(args)


def _show_row(args: argparse.Namespace) -> int:
    from data_prep.reports import RowReader
    from forgetscale.data import TokenSet

    if args.directory is None:
        raise ConfigError("inspect: --row needs a token set folder, not --run.")
    print(RowReader(TokenSet(args.directory), args.tokenizer).describe(args.row))
    return 0


def _show_step(args: argparse.Namespace) -> int:
    from data_prep.reports import RowReader

    data, seed, batch, skips = _of_run(args) if args.run_folder else _of_set(args)
    world_size = args.world_size or 1
    if args.rank is not None and not 0 <= args.rank < world_size:
        raise ConfigError(f"--rank must lie in 0..{world_size - 1}, got {args.rank}.")
    rows = rows_of_step(
        data, args.step, seed=seed, global_batch_size=batch, world_size=world_size, skips=skips
    )
    readers: dict[int, RowReader] = {}
    for seen in rows:
        if args.rank is not None and seen.rank != args.rank:
            continue
        if seen.set_id not in readers:
            part = data.parts[seen.set_id]
            readers[seen.set_id] = RowReader(part.token_set, args.tokenizer)
        note = f"; step {args.step}, rank {seen.rank} of {world_size}"
        if seen.skipped:
            note += "; on the skip list, no target"
        print(readers[seen.set_id].describe(seen.row, note) + "\n")
    return 0


def _of_set(args: argparse.Namespace) -> tuple[TrainingData, int, int, SkipList | None]:
    from forgetscale.config.data import SftDataConfig, TokenDataConfig
    from forgetscale.data import TokenSet, open_data

    if args.global_batch_size is None or args.global_batch_size < 1:
        raise ConfigError(
            f"inspect: --step needs --global-batch-size >= 1, got {args.global_batch_size}; or pass"
            " --run."
        )
    seed = 42 if args.seed is None else args.seed
    config: TokenDataConfig | SftDataConfig
    if TokenSet(args.directory).is_supervised:
        config = SftDataConfig(kind="sft", path=args.directory, shuffle_seed=seed)
    else:
        config = TokenDataConfig(path=args.directory, shuffle_seed=seed)
    return open_data(config), seed, args.global_batch_size, None


def _of_run(args: argparse.Namespace) -> tuple[TrainingData, int, int, SkipList | None]:
    from forgetscale.config import load_recipe
    from forgetscale.data import SKIP_LIST_FILE, SkipList, open_data, read_skips

    if args.global_batch_size is not None or args.seed is not None:
        raise ConfigError(
            "inspect: --global-batch-size and --seed stand in the run's recipe; leave them out with"
            " --run."
        )
    recipe = load_recipe(args.run_folder / "recipe.yaml")
    data = open_data(recipe.data)
    ledger = args.run_folder / SKIP_LIST_FILE
    skips = SkipList(data, read_skips(ledger)) if ledger.is_file() else None
    return data, recipe.data.shuffle_seed, recipe.train.global_batch_size, skips

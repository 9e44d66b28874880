"""What happens after a bad step: skip it; go back and quarantine its rows; stop and name them.

Every rung is taken by all ranks together and stands in the ledger before it is done, so a start
after a crash finishes what was begun and the run repeats its past exactly. How it goes together
with the retention gate stands in ``forgetscale.engine.retention``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from forgetscale.checkpoint import CheckpointStore
from forgetscale.data import (
    SKIP_LIST_FILE,
    SkipList,
    SkippedRow,
    StreamBatch,
    TrainingData,
    append_skips,
    read_skips,
)
from forgetscale.engine.ledger import Ledger
from forgetscale.engine.micro_batches import MicroBatch
from forgetscale.errors import NonFiniteError
from forgetscale.ops import IGNORE_INDEX
from forgetscale.zero3 import World, ZeroEngine

if TYPE_CHECKING:
    from forgetscale.engine.loop import Training

REASON = "bad step"
"""What the skip list says of a row in quarantine."""
_NAMED = 8
"""Rows that a message names; the ledger has them all."""


class RolledBack(Exception):
    """The run goes back to an earlier checkpoint; what starts it starts it again.

    Args:
        step: Step of that checkpoint.
    """

    def __init__(self, step: int) -> None:
        super().__init__(f"rolled back to step {step}")
        self.step = step


class Row(NamedTuple):
    """A row of the training data."""

    set: str
    """Content hash of its token set."""
    row: int


@torch.no_grad()
def row_losses(engine: ZeroEngine, batches: Sequence[MicroBatch]) -> Tensor:
    """Return the mean loss of each row by itself, 0 where it has no target, ``[rows]``.

    Args:
        engine: The model, between two steps.
        batches: This rank's micro-batches of a step, as many as every other rank has.

    Collective: every rank must call it.
    """
    engine.set_training(False)
    found = []
    for batch in batches:
        here = batch.to(engine.world.device)
        nll, _ = engine(
            here.input_ids, labels=here.labels, mode="score", position_ids=here.position_ids
        )
        counted = here.labels[:, 1:] != IGNORE_INDEX
        sums = torch.where(counted, nll.double(), 0.0).sum(1)
        found.append((sums / counted.sum(1).clamp_min(1)).cpu())
    engine.set_training(True)
    return torch.cat(found)


def rows_to_blame(
    engine: ZeroEngine,
    data: TrainingData,
    batch: StreamBatch,
    batches: Sequence[MicroBatch],
    limit: float,
) -> list[Row]:
    """Return the rows of a step whose own loss is not finite or above ``limit``.

    If no row shows it alone, the whole global batch is to blame.

    Args:
        engine: The model, between two steps.
        data: The training data.
        batch: This rank's rows of the step.
        batches: The same as micro-batches.
        limit: Loss of a spike.

    Collective: every rank must call it.
    """
    losses = row_losses(engine, batches)[: len(batch.row_ids)]
    bad = ~torch.isfinite(losses) | (losses > limit)

    def named(chosen: Tensor) -> list[Row]:
        hashes = [part.token_set.content_hash for part in data.parts]
        places = zip(batch.set_ids[chosen].tolist(), batch.row_ids[chosen].tolist(), strict=True)
        return [Row(hashes[index], row) for index, row in places]

    gathered = engine.world.gather_objects((named(bad), named(~batch.skipped)))
    blamed = [row for mine, _ in gathered for row in mine]
    return sorted(set(blamed or [row for _, every in gathered for row in every]))


def describe_rows(data: TrainingData, rows: Sequence[Row]) -> str:
    """Return rows and their documents as text, the first few of them."""
    parts = {part.token_set.content_hash: part for part in data.parts}
    found = []
    for row in rows[:_NAMED]:
        part = parts[row.set]
        pieces = [f"{p.file}:{p.line}" for p in part.token_set.document_pieces(row.row)]
        found.append(f"row {row.row} of {part.name} ({', '.join(pieces)})")
    more = f" and {len(rows) - _NAMED} more" if len(rows) > _NAMED else ""
    return "; ".join(found) + more


def climb(
    job: Training, batch: StreamBatch, batches: Sequence[MicroBatch], step: int, reason: str
) -> bool:
    """Deal with a step that was not done.

    Args:
        job: The run; its state still is the one before the step.
        batch: This rank's rows of the step.
        batches: The same as micro-batches.
        step: The step.
        reason: What was wrong, the same on every rank.

    Returns:
        True if the step is to be taken again without its rows; False if it is passed over.

    Collective: every rank must call it.

    Raises:
        RolledBack: The run starts again from an earlier checkpoint.
        NonFiniteError: The run went back often enough; the message names the documents.
    """
    data, limit = job.stream.data, job.guard.loss_limit()
    rows = rows_to_blame(job.engine, data, batch, batches, limit)
    text = job.world.on_main(lambda: describe_rows(data, rows))
    job.ledger.note("skipped", step=step, reason=reason, rows=rows, documents=text)
    job.log(f"step {step} skipped: {reason}; {text}")
    if not job.guard.skip(step, rows):
        return False
    rollbacks = sum(event["event"] == "rolling_back" for event in job.ledger.events())
    if rollbacks >= job.guard.config.max_rollbacks:
        job.store.advance(wait=True)
        job.ledger.note("stopped", step=step, reason=reason, documents=text)
        raise NonFiniteError(
            f"step {step}: {reason}; no weight was changed; {len(job.guard.skips)} steps were"
            f" skipped since the run went back {rollbacks} times; to blame: {text}; look at them"
            " with python -m data_prep inspect, name them in data.skip_rows or lower optim.lr."
        )
    _roll_back(job, step)
    return True


def _roll_back(job: Training, step: int) -> None:
    guard = job.guard
    job.store.advance(wait=True)
    first = min(skip["step"] for skip in guard.skips)
    target = job.store.find(before=first) or job.store.find()
    rows = sorted({Row(*row) for skip in guard.skips for row in skip["rows"]})
    # Without a checkpoint the run stays where it is: what was skipped has changed no weight.
    place = job.state if target is None else target
    job.ledger.note(
        "rolling_back",
        step=step,
        to_step=place.step,
        cursor=place.cursor,
        rows=rows,
        reloaded=target is not None,
    )
    data, folder = job.stream.data, job.recipe.run.output_dir
    longer = quarantine(job.world, data, folder, rows, place.step, place.cursor)
    if target is not None:
        job.store.remove_after(target.step)
        raise RolledBack(target.step)
    job.stream.skips = longer
    job.stream.seek(job.state.cursor)
    guard.forgive()
    job.state = replace(job.state, guard=guard.state())
    job.ledger.note("rolled_back", step=job.state.step, rows=len(rows))
    job.log(f"step {step} is taken again; {len(rows)} rows are in quarantine")


def quarantine(
    world: World, data: TrainingData, folder: Path, rows: Sequence[Row], step: int, cursor: int
) -> SkipList:
    """Put rows on the run's lasting skip list, from a position of the stream on; return the list.

    Rows that are on it already stay as they are, so doing it twice does it once.
    Collective: every rank must call it.

    Raises:
        DataError: Nothing would be left to train on.
    """
    path = folder / SKIP_LIST_FILE

    def add() -> tuple[SkippedRow, ...]:
        known = SkipList(data, read_skips(path) if path.is_file() else ())
        named = [SkippedRow(row.set, row.row, REASON, step, cursor) for row in rows]
        new = [entry for entry in named if not known.holds(entry)]
        longer = known.with_entries(new)
        append_skips(path, new)
        return longer.entries

    return SkipList(data, world.on_main(add))


def finish_rollback(
    ledger: Ledger,
    store: CheckpointStore,
    world: World,
    data: TrainingData,
    folder: Path,
    log: Callable[[str], None],
) -> None:
    """Finish going back, also where a crash cut it short; call it before a checkpoint is chosen.

    Collective: every rank must call it.
    """
    events = [e for e in ledger.events() if e["event"] in ("rolling_back", "rolled_back")]
    if not events or events[-1]["event"] == "rolled_back":
        return
    last = events[-1]
    rows = [Row(*row) for row in last["rows"]]
    quarantine(world, data, folder, rows, last["to_step"], last["cursor"])
    if last["reloaded"]:
        store.remove_after(last["to_step"])
    ledger.note("rolled_back", step=last["to_step"], rows=len(rows))
    log(f"went back to step {last['to_step']}; {len(rows)} rows are in quarantine")

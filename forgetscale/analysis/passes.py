"""Passes of a model over rows of token sets, cut the same way for any number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from forgetscale.config import Recipe
from forgetscale.data import TokenSet, TrainingData
from forgetscale.engine.micro_batches import MicroBatch, micro_batches
from forgetscale.errors import ForgetScaleError
from forgetscale.ops import IGNORE_INDEX
from forgetscale.ops.observe import Columns, Observer
from forgetscale.progress import Progress
from forgetscale.zero3 import ZeroEngine


@dataclass(frozen=True, slots=True)
class Span:
    """Rows of one set that one rank looks at in one turn."""

    set_index: int
    rows: Int64[np.ndarray, " rows"]


@dataclass(frozen=True, slots=True)
class Seen:
    """What was noted about the targets of a span, in the order of its rows."""

    row: Int64[Tensor, " M"]
    """Which row of the span each target is in."""
    place: Int64[Tensor, " M"]
    """Which token of its row it is."""
    label: Int64[Tensor, " M"]
    columns: Columns


def read_batches(
    recipe: Recipe,
    token_set: TokenSet,
    rows: Int64[np.ndarray, " rows"],
    count: int,
) -> list[MicroBatch]:
    """Return rows of a set as the micro-batches that training would make of them.

    Args:
        recipe: Resolved recipe.
        token_set: The set.
        rows: Row numbers; none where a rank only keeps the others company.
        count: Micro-batches, enough for the rows.

    Raises:
        DataError: A row is damaged.
    """
    size, mask = recipe.train.micro_batch_size, recipe.data.document_mask
    ids = token_set.read(rows)
    pieces = mask or token_set.num_padding_tokens > 0
    return list(
        micro_batches(
            ids,
            size,
            count,
            doc_lens=token_set.document_lens(rows) if pieces else None,
            document_mask=mask,
            loss_mask=token_set.loss_mask(rows) if token_set.is_supervised else None,
        )
    )


@torch.no_grad()
def observe(engine: ZeroEngine, batches: Sequence[MicroBatch], observer: Observer) -> Seen:
    """Run the model over micro-batches and note what the observer asks for, in host memory.

    Args:
        engine: The model, in evaluation mode.
        batches: As many as every other rank has, of the same shape.
        observer: What to note.

    Collective: every rank must call it.
    """
    rows, places, labels = [], [], []
    found: list[Columns] = []
    for number, batch in enumerate(batches):
        here = batch.to(engine.world.device)
        columns = engine(here.input_ids, here.labels, observer, position_ids=here.position_ids)
        targets = batch.labels[:, 1:] != IGNORE_INDEX
        row, place = targets.nonzero(as_tuple=True)
        rows.append(row + number * batch.labels.shape[0])
        places.append(place + 1)
        labels.append(batch.labels[:, 1:][targets])
        found.append({name: column.cpu() for name, column in columns.items()})
    joined = {name: torch.cat([item[name] for item in found]) for name in found[0]}
    return Seen(torch.cat(rows), torch.cat(places), torch.cat(labels), joined)


def walk(
    engine: ZeroEngine,
    recipe: Recipe,
    data: TrainingData,
    spans: Sequence[Span],
    observer: Observer,
    consume: Callable[[int, Seen], None],
    progress: Progress,
) -> None:
    """Look at spans, ranks side by side.

    Args:
        engine: The model; put into evaluation mode.
        recipe: Resolved recipe.
        data: Holds the sets.
        spans: The same on every rank.
        observer: What to note.
        consume: Takes the number of a span and what was noted, on the rank that looked at it.
        progress: Counts rows.

    Raises:
        ForgetScaleError: A row is damaged, or ``consume`` failed on some rank.
        StoppedEarly: Some rank was asked to stop.

    Collective: every rank must call it.
    """
    world = engine.world
    engine.set_training(False)
    error: ForgetScaleError | OSError | None = None
    done = 0
    for first in range(0, len(spans), world.size):
        turn = spans[first : first + world.size]
        count = -(-max(len(span.rows) for span in turn) // recipe.train.micro_batch_size)
        mine = turn[world.rank] if world.rank < len(turn) else Span(0, np.arange(0))
        token_set = data.parts[mine.set_index].token_set
        try:
            batches = read_batches(recipe, token_set, mine.rows, count)
        except (ForgetScaleError, OSError) as found:
            error = error or found
        world.agree(error)
        seen = observe(engine, batches, observer)
        if world.rank < len(turn):
            try:
                consume(first + world.rank, seen)
            except (ForgetScaleError, OSError) as found:
                error = found
        done += sum(len(span.rows) for span in turn)
        progress.update(done)
        world.stop_if_asked("during the pass over rows")
    world.agree(error)

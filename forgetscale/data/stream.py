"""The resumable stream of training rows.

One integer is the whole state: the number of rows consumed by all ranks. Everything else is
computed from the content of the set and the seed, so a stream can be reopened anywhere, with any
number of ranks, at once and without worker processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from forgetscale.data.mixture import MixedOrder
from forgetscale.data.skip_list import SkipList
from forgetscale.data.token_set import TokenSet
from forgetscale.data.training_data import DataPart, TrainingData
from forgetscale.errors import DataError


@dataclass(frozen=True, slots=True)
class StreamBatch:
    """This rank's rows of one global batch."""

    input_ids: Int64[Tensor, "rows block"]
    row_ids: Int64[Tensor, " rows"]
    """Row numbers in their sets."""
    set_ids: Int64[Tensor, " rows"]
    """Which set of the mixture each row is from; 0 for a single set."""
    skipped: Bool[Tensor, " rows"]
    """True where a row is on the skip list: it keeps its place and carries no target."""
    cursor: int
    """Rows consumed by all ranks after this batch; pass it to ``open_stream`` to go on."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """For ``metrics.jsonl``: shares of a mixture so far, skipped rows of the global batch."""
    doc_lens: Int64[Tensor, "rows pieces"] | None = None
    """Tokens of each document piece of a row, zeros after the last one; what a row has beyond
    their sum is padding. None: no row has padding, and pieces were not asked for."""
    loss_mask: Bool[Tensor, "rows block"] | None = None
    """Which tokens may be targets; None: all, no set holds SFT rows."""


@dataclass(frozen=True, slots=True)
class RowShare:
    """Which rows one rank has of one global batch."""

    set_ids: Int64[np.ndarray, " rows"]
    row_ids: Int64[np.ndarray, " rows"]
    skipped: Bool[np.ndarray, " rows"]
    num_skipped: int
    """Skipped rows of the whole global batch."""
    cursor: int
    """Rows consumed by all ranks after this batch."""


class RowStream(Iterator[RowShare]):
    """Endless iterator over the rows of one rank, without their tokens.

    ``TokenStream`` reads what this one names; ``forgetscale check --data`` replays it.

    Attributes:
        cursor: Rows consumed by all ranks so far.
        skips: Rows that carry no targets, or None.
    """

    def __init__(
        self,
        order: MixedOrder,
        skips: SkipList | None,
        *,
        global_batch_size: int,
        rank: int,
        world_size: int,
        cursor: int,
    ) -> None:
        self.cursor = cursor
        self.skips = skips
        self._order = order
        self._global_batch_size = global_batch_size
        self._first = global_batch_size * rank // world_size
        self._count = global_batch_size * (rank + 1) // world_size - self._first

    def counts(self) -> Int64[np.ndarray, " sets"]:
        """Return how many rows of each set are behind the cursor."""
        return self._order.counts(self.cursor)

    def __next__(self) -> RowShare:
        """Return the next share; a global batch without any target is passed over."""
        num_skipped = 0
        while self.skips is not None and len(self.skips):
            whole = self._order.draw(self.cursor, self._global_batch_size)
            num_skipped = int(self.skips.skipped(self.cursor, *whole).sum())
            if num_skipped < self._global_batch_size:
                break
            self.cursor += self._global_batch_size
        first = self.cursor + self._first
        set_ids, rows = self._order.draw(first, self._count)
        if num_skipped and self.skips is not None:
            skipped = self.skips.skipped(first, set_ids, rows)
        else:
            skipped = np.zeros(self._count, dtype=bool)
        self.cursor += self._global_batch_size
        return RowShare(set_ids, rows, skipped, num_skipped, self.cursor)


class TokenStream(Iterator[StreamBatch]):
    """Endless iterator over this rank's batches; made by ``open_stream``.

    Attributes:
        data: The sets that are read.
    """

    def __init__(self, data: TrainingData, rows: RowStream, *, documents: bool) -> None:
        self.data = data
        self._rows = rows
        self._documents = documents or data.has_padding

    @property
    def cursor(self) -> int:
        """Rows consumed by all ranks so far."""
        return self._rows.cursor

    def seek(self, cursor: int) -> None:
        """Go on after so many rows of all ranks, as a stream opened with that cursor does."""
        self._rows.cursor = cursor

    @property
    def skips(self) -> SkipList | None:
        """Rows that carry no targets; a longer list may be put in its place at any time."""
        return self._rows.skips

    @skips.setter
    def skips(self, skips: SkipList) -> None:
        self._rows.skips = skips

    @property
    def epochs(self) -> tuple[int, ...]:
        """Whole passes over each set that are behind the cursor."""
        return tuple(
            int(count) // part.token_set.num_rows
            for count, part in zip(self._rows.counts(), self.data.parts, strict=True)
        )

    def __next__(self) -> StreamBatch:
        """Return the next batch of this rank.

        Raises:
            DataError: A row is damaged; the cursor stays before it, so asking again raises again.
        """
        before = self._rows.cursor
        share = next(self._rows)
        set_ids, rows = share.set_ids, share.row_ids
        try:
            input_ids = self.data.read(set_ids, rows)
        except DataError:
            self._rows.cursor = before
            raise
        metrics: dict[str, float] = {}
        if self.skips is not None and len(self.skips):
            metrics["data/skipped_rows"] = share.num_skipped
        if len(self.data.parts) > 1:
            metrics |= self.data.shares(self._rows.counts())
        return StreamBatch(
            input_ids=input_ids,
            row_ids=torch.from_numpy(rows.copy()),
            set_ids=torch.from_numpy(set_ids),
            skipped=torch.from_numpy(share.skipped),
            cursor=share.cursor,
            metrics=metrics,
            doc_lens=self.data.document_lens(set_ids, rows) if self._documents else None,
            loss_mask=self.data.loss_mask(set_ids, rows) if self.data.is_supervised else None,
        )


def open_stream(
    path: str | Path | TokenSet | TrainingData,
    *,
    seed: int,
    global_batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    cursor: int = 0,
    skips: SkipList | None = None,
    documents: bool = False,
) -> TokenStream:
    """Open the training stream of a token set, or of a mixture of sets, for one rank.

    Global batch ``b`` holds the rows at positions ``b * global_batch_size`` and on of an order that
    depends on the content of the set, the seed and the epoch alone. Epochs follow one another; a
    global batch may straddle two. Ranks take contiguous parts of it that differ by one row at
    most, so every row comes exactly once per epoch for any number of ranks and interruptions, and
    a stream reopened with another batch size goes on with the next unseen row.

    Args:
        path: Token set folder, an open ``TokenSet``, or ``TrainingData`` of one or more sets.
        seed: Seed of the order.
        global_batch_size: Rows a step over all ranks, >= 1.
        rank: This rank, 0..world_size - 1.
        world_size: Ranks that share each global batch, >= 1; ranks beyond the batch get no rows.
        cursor: Rows already consumed by all ranks, >= 0 (``StreamBatch.cursor`` of the last one).
        skips: Rows that keep their place but carry no targets; None for none.
        documents: Deliver ``doc_lens`` with each batch; sets with padding always do.

    Returns:
        An endless iterator of ``StreamBatch``.

    Raises:
        DataError: There is no valid token set at ``path``; later, when a damaged row is reached.
        ValueError: A number is out of range.
    """
    if global_batch_size < 1 or not 0 <= rank < world_size or cursor < 0:
        raise ValueError(
            f"need global_batch_size >= 1, 0 <= rank < world_size and cursor >= 0, got"
            f" {global_batch_size=}, {rank=}, {world_size=}, {cursor=}"
        )
    if isinstance(path, TrainingData):
        data = path
    else:
        token_set = path if isinstance(path, TokenSet) else TokenSet(path)
        data = TrainingData([DataPart(token_set.path.name, token_set, 1, None)])
    rows = RowStream(
        data.order(seed),
        skips,
        global_batch_size=global_batch_size,
        rank=rank,
        world_size=world_size,
        cursor=cursor,
    )
    return TokenStream(data, rows, documents=documents)


def calibration_rows(total: int, num_blocks: int) -> list[int]:
    """Return which rows of a calibration set are used: evenly spaced, at most ``num_blocks``.

    Args:
        total: Rows of the set, >= 1.
        num_blocks: Rows wanted, >= 1.

    Raises:
        ValueError: A number is below 1.

    Source:
        arXiv:2512.04844, reference code ``create_calibration_dataloader``: indices
        ``range(0, total, max(1, total // num_blocks))[:num_blocks]``.
    """
    if total < 1 or num_blocks < 1:
        raise ValueError(f"total and num_blocks must be >= 1, got {total} and {num_blocks}")
    return list(range(0, total, max(1, total // num_blocks))[:num_blocks])

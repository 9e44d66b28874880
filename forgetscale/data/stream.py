"""The resumable stream of training rows.

One integer is the whole state: the number of rows consumed by all ranks. Everything else is
computed from the content of the set and the seed, so a stream can be reopened anywhere, with any
number of ranks, at once and without worker processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int64
from torch import Tensor

from forgetscale.data.order import RowOrder
from forgetscale.data.token_set import TokenSet


@dataclass(frozen=True, slots=True)
class StreamBatch:
    """This rank's rows of one global batch."""

    input_ids: Int64[Tensor, "rows block"]
    row_ids: Int64[Tensor, " rows"]
    """Row numbers in the set."""
    cursor: int
    """Rows consumed by all ranks after this batch; pass it to ``open_stream`` to go on."""


class TokenStream(Iterator[StreamBatch]):
    """Endless iterator over this rank's batches; made by ``open_stream``.

    Attributes:
        token_set: The set that is read.
        cursor: Rows consumed by all ranks so far.
    """

    def __init__(
        self,
        token_set: TokenSet,
        *,
        seed: int,
        global_batch_size: int,
        rank: int,
        world_size: int,
        cursor: int,
    ) -> None:
        self.token_set = token_set
        self.cursor = cursor
        self._global_batch_size = global_batch_size
        self._first = global_batch_size * rank // world_size
        self._count = global_batch_size * (rank + 1) // world_size - self._first
        self._order = RowOrder(token_set.num_rows, token_set.content_hash, seed)

    @property
    def epoch(self) -> int:
        """Whole passes over the set that are behind the cursor."""
        return self.cursor // self.token_set.num_rows

    def __next__(self) -> StreamBatch:
        """Return the next batch of this rank."""
        rows = self._order.rows(self.cursor + self._first, self._count)
        input_ids = self.token_set.read(rows)
        self.cursor += self._global_batch_size
        return StreamBatch(input_ids, torch.from_numpy(rows.copy()), self.cursor)


def open_stream(
    path: str | Path | TokenSet,
    *,
    seed: int,
    global_batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    cursor: int = 0,
) -> TokenStream:
    """Open the training stream of a token set for one rank.

    Global batch ``b`` holds the rows at positions ``b * global_batch_size`` and on of an order that
    depends on the content of the set, the seed and the epoch alone. Epochs follow one another; a
    global batch may straddle two. Ranks take contiguous parts of it that differ by one row at
    most, so every row comes exactly once per epoch for any number of ranks and interruptions.

    Args:
        path: Token set folder, or an open ``TokenSet``.
        seed: Seed of the order.
        global_batch_size: Rows a step over all ranks, >= 1.
        rank: This rank, 0..world_size - 1.
        world_size: Ranks that share each global batch, >= 1; ranks beyond the batch get no rows.
        cursor: Rows already consumed by all ranks, >= 0 (``StreamBatch.cursor`` of the last one).

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
    token_set = path if isinstance(path, TokenSet) else TokenSet(path)
    return TokenStream(
        token_set,
        seed=seed,
        global_batch_size=global_batch_size,
        rank=rank,
        world_size=world_size,
        cursor=cursor,
    )


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

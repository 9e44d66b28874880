"""Rows with labels for Fisher information: cut into passes the same way for any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from forgetscale.api import Batch, LabelledBatch
from forgetscale.config import CalibrationConfig
from forgetscale.data import TokenSet, calibration_rows
from forgetscale.errors import DataError
from forgetscale.ops import IGNORE_INDEX
from forgetscale.ops.documents import packed_labels
from forgetscale.ops.losses import (
    LossFunction,
    cross_entropy,
    sampled_cross_entropy,
    uniform_numbers,
)
from forgetscale.zero3 import World


class LabelledRows:
    """The rows of one set that are used, in passes of ``micro_batch_size``.

    Pass ``g`` always holds the same rows; ranks take passes in turn. A rank without one in the
    last turn gets one without labels, so that all make the same number.

    Args:
        token_set: Data.
        config: Which rows, and how many a pass.
        world: This process among all.
        seed: Seed of drawn labels.
        sampled: Draw labels from the model; else the data's.

    Raises:
        DataError: The rows hold no target.
    """

    def __init__(
        self,
        token_set: TokenSet,
        config: CalibrationConfig,
        world: World,
        *,
        seed: int,
        sampled: bool,
    ) -> None:
        self._set, self._world, self._seed, self._sampled = token_set, world, seed, sampled
        self._size = config.micro_batch_size
        self._rows = calibration_rows(token_set.num_rows, config.num_blocks)
        mine = self._rows[world.rank :: world.size]
        targets = sum(int((self._targets([row])[:, 1:] != IGNORE_INDEX).sum()) for row in mine)
        if not int(world.sum(torch.tensor([targets]))):
            raise DataError(
                f"{token_set.path}: the {len(self._rows)} rows used hold no target (no supervised"
                " token, or rows of one token); check the set."
            )

    def __len__(self) -> int:
        """Return the number of rows used."""
        return len(self._rows)

    def _targets(self, rows: Sequence[int]) -> Tensor:
        ids = self._set.read(rows)
        labels = ids
        if self._set.num_padding_tokens or self._set.is_supervised:
            labels = packed_labels(ids, self._set.document_lens(rows), document_mask=False)
        if self._set.is_supervised:
            labels = labels.masked_fill(~self._set.loss_mask(rows), IGNORE_INDEX)
        return labels

    def _real(self, rows: Sequence[int], length: int) -> Tensor:
        if not self._set.num_padding_tokens:
            return torch.ones(len(rows), length, dtype=torch.bool)
        lens = self._set.document_lens(rows).sum(1, keepdim=True)
        return torch.arange(length) < lens

    def _labelled(self, blocks: list[int], real: bool) -> LabelledBatch:
        count = len(blocks)
        blocks = blocks + blocks[-1:] * (self._size - count)
        rows = [self._rows[block] for block in blocks]
        ids, labels = self._set.read(rows), self._targets(rows)
        weight = torch.zeros(self._size)
        weight[:count] = float(real)
        labels = labels.masked_fill((weight == 0)[:, None], IGNORE_INDEX)
        here = self._real(rows, ids.shape[1]) & (weight > 0)[:, None]
        device = self._world.device
        loss: LossFunction = cross_entropy
        if self._sampled:
            numbers = [uniform_numbers(self._seed, block, ids.shape[1]) for block in blocks]
            places = torch.arange(ids.numel()).view_as(ids)
            labels = torch.where(labels == IGNORE_INDEX, labels, places)
            loss = sampled_cross_entropy(torch.cat(numbers).to(device))
        batch = Batch(ids.to(device), weight.to(device), torch.tensor(blocks, device=device))
        return LabelledBatch(batch, labels.to(device), here.to(device), loss)

    def _turns(self, blocks: range) -> Iterator[tuple[LabelledBatch, bool]]:
        """Yield this rank's passes over some rows, and whether each is the last."""
        passes = [list(blocks[at : at + self._size]) for at in range(0, len(blocks), self._size)]
        world = self._world
        turns = -(-len(passes) // world.size)
        for turn in range(turns):
            index = turn * world.size + world.rank
            real = index < len(passes)
            yield self._labelled(passes[index if real else 0], real), turn == turns - 1

    def passes(self) -> Iterator[LabelledBatch]:
        """Yield this rank's passes over all rows."""
        for item, _ in self._turns(range(len(self))):
            yield item

    def samples(self, per_sample: int) -> Iterator[Iterator[tuple[LabelledBatch, bool]]]:
        """Yield, for every ``per_sample`` rows, this rank's passes and whether each is the last."""
        for first in range(0, len(self), per_sample):
            yield self._turns(range(first, min(first + per_sample, len(self))))

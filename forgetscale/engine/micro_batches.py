"""A rank's share of a step, cut into micro-batches of equal shape."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from forgetscale.data import StreamBatch
from forgetscale.ops import IGNORE_INDEX
from forgetscale.ops.documents import document_positions, packed_labels


class MicroBatch(NamedTuple):
    """What one forward pass of training gets."""

    input_ids: Int64[Tensor, "B T"]
    labels: Int64[Tensor, "B T"]
    position_ids: Int64[Tensor, "B T"] | None = None
    """Places that restart with each document; None: attention is not masked."""
    extra: Mapping[str, Tensor] = MappingProxyType({})
    """``[B, T, ...]`` by name: what the loss needs at each target beside logits and labels."""

    def to(self, device: torch.device) -> MicroBatch:
        """Return the same on a device."""
        places = None if self.position_ids is None else self.position_ids.to(device)
        extra = {name: value.to(device) for name, value in self.extra.items()}
        return MicroBatch(self.input_ids.to(device), self.labels.to(device), places, extra)


def micro_batches(
    rows: Int64[Tensor, "rows T"],
    size: int,
    count: int,
    skipped: Bool[Tensor, " rows"] | None = None,
    doc_lens: Int64[Tensor, "rows pieces"] | None = None,
    *,
    document_mask: bool = False,
    loss_mask: Bool[Tensor, "rows T"] | None = None,
    extra: Mapping[str, Tensor] | None = None,
) -> Iterator[MicroBatch]:
    """Cut a rank's rows into ``count`` micro-batches of ``size`` rows, the same on every rank.

    Missing and skipped rows are filled with token 0 and carry no target, so that all ranks make the
    same number of passes of the same shape whatever the division leaves.

    Args:
        rows: Token ids of this rank's share of the step.
        size: Rows per micro-batch.
        count: Micro-batches; ``count * size`` is at least the number of rows.
        skipped: True for rows that carry no target; None for none.
        doc_lens: Tokens of the document pieces of each row; None: rows without padding.
        document_mask: Documents do not see each other; needs ``doc_lens``.
        loss_mask: False at tokens that are no targets; None: SFT rows are not among the rows.
        extra: ``[rows, T, ...]`` by name, aligned with the labels; cut as the rows are.

    Yields:
        Micro-batches of ``size`` rows; padding is no target.
    """
    assert rows.shape[0] <= size * count, (rows.shape, size, count)
    assert doc_lens is not None or not document_mask
    targets = rows
    if doc_lens is not None:
        targets = packed_labels(rows, doc_lens, document_mask=document_mask)
    if loss_mask is not None:
        targets = targets.masked_fill(~loss_mask, IGNORE_INDEX)
    for start in range(0, size * count, size):
        part = rows[start : start + size]
        ids = rows.new_zeros(size, rows.shape[1])
        labels = rows.new_full((size, rows.shape[1]), IGNORE_INDEX)
        ids[: part.shape[0]] = part
        labels[: part.shape[0]] = targets[start : start + size]
        if skipped is not None:
            # Without its text too: what it computes might not be finite, and 0 x NaN is NaN.
            ids[: part.shape[0]][skipped[start : start + size]] = 0
            labels[: part.shape[0]][skipped[start : start + size]] = IGNORE_INDEX
        positions = None
        if document_mask and doc_lens is not None:
            positions = torch.arange(rows.shape[1]).repeat(size, 1)
            lens = doc_lens[start : start + size]
            positions[: part.shape[0]] = document_positions(lens, rows.shape[1])
        more = {
            name: _filled(value[start : start + size], size)
            for name, value in (extra or {}).items()
        }
        yield MicroBatch(ids, labels, positions, more)


def _filled(part: Tensor, size: int) -> Tensor:
    """Return ``part`` with zeros for missing rows."""
    out = part.new_zeros(size, *part.shape[1:])
    out[: part.shape[0]] = part
    return out


def batches_of(
    batch: StreamBatch,
    *,
    size: int,
    count: int,
    document_mask: bool,
    extra: Mapping[str, Tensor] | None = None,
) -> list[MicroBatch]:
    """Return the micro-batches of this rank's share of a step; see ``micro_batches``."""
    return list(
        micro_batches(
            batch.input_ids,
            size,
            count,
            batch.skipped,
            batch.doc_lens,
            document_mask=document_mask,
            loss_mask=batch.loss_mask,
            extra=extra,
        )
    )

"""Freeze masks on flat slices of row-major matrices.

Element ``o`` of the flattened ``[out, in]`` tensor sits in column ``o % in`` and row ``o // in``.
So one bit per column decides every slice, wherever a rank's border falls: nothing is gathered and
no mask of the tensor's size exists. A vector ``[n]`` is one row of ``n`` columns.

Shape letters: S elements of a slice, I columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int64
from torch import Tensor


def split_rows(start: int, length: int, width: int) -> tuple[int, int]:
    """Cut a flat slice at row borders.

    Args:
        start: First element of the slice in the flattened tensor.
        length: Elements in the slice.
        width: Elements per row.

    Returns:
        ``(head, body)``: elements before the first row border, and elements in whole rows after
        it; what is left is the tail.
    """
    head = min(length, -start % width)
    return head, (length - head) // width * width


def column_power_sums(
    flat: Float[Tensor, " S"], start: int, width: int, power: int
) -> Float[Tensor, " I"]:
    """Return ``sum |w|^power`` per column over one slice, in fp64 (add over ranks for the whole).

    Args:
        flat: Slice of the flattened matrix, without padding.
        start: First element of the slice in the flattened matrix.
        width: Columns of the matrix.
        power: 1 or 2.
    """
    if power not in (1, 2):
        raise ValueError(f"power must be 1 or 2, got {power}")
    sums = torch.zeros(width, dtype=torch.float64, device=flat.device)
    head, body = split_rows(start, flat.numel(), width)
    values = flat.double().abs_() if power == 1 else flat.double().square_()
    first = start % width
    sums[first : first + head] += values[:head]
    sums += values[head : head + body].view(-1, width).sum(0)
    tail = values[head + body :]
    sums[: tail.numel()] += tail
    return sums


@dataclass(frozen=True, slots=True)
class SliceMask:
    """A freeze plan's view of one slice of one parameter.

    Args:
        start: First element of the slice in the flattened parameter.
        length: Elements in the slice, padding excluded.
        width: Columns (``in_features``; ``n`` for a vector).
        columns: Sorted indices of frozen columns, or None.
        rows: Sorted indices of frozen rows, or None.
    """

    start: int
    length: int
    width: int
    columns: Int64[Tensor, " frozen_columns"] | None = None
    rows: Int64[Tensor, " frozen_rows"] | None = None
    _keep: dict[tuple[torch.dtype, torch.device], Tensor] = field(default_factory=dict)

    @classmethod
    def build(
        cls,
        start: int,
        length: int,
        width: int,
        columns: Tensor | None,
        rows: Tensor | None,
    ) -> SliceMask:
        """Keep only the rows this slice touches.

        The indices stay on the CPU; vectors made from them follow the tensors they are used on,
        since with offload the working copy and the masters live on different devices.
        """
        if rows is not None:
            low, high = start // width, -(-(start + length) // width)
            rows = rows[(rows >= low) & (rows < high)].cpu()
        return cls(start, length, width, None if columns is None else columns.cpu(), rows)

    def _keep_vector(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        key = (dtype, like.device)
        if key not in self._keep:
            assert self.columns is not None
            keep = torch.ones(self.width, dtype=dtype)
            keep[self.columns] = 0
            self._keep[key] = keep.to(like.device)
        return self._keep[key]

    def _pieces(self, flat: Tensor, vector: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        head, body = split_rows(self.start, self.length, self.width)
        first = self.start % self.width
        yield flat[:head], vector[first : first + head]
        yield flat[head : head + body].view(-1, self.width), vector
        tail = flat[head + body : self.length]
        yield tail, vector[: tail.numel()]

    def _row_spans(self) -> Iterator[tuple[int, int]]:
        if self.rows is None:
            return
        for row in self.rows.tolist():
            low = max(row * self.width - self.start, 0)
            high = min((row + 1) * self.width - self.start, self.length)
            yield low, high

    def zero_frozen_(self, grad: Float[Tensor, " S"]) -> None:
        """Zero frozen elements of a gradient slice in place.

        Columns are multiplied by zero, not overwritten: a NaN there stays a NaN and is noticed.
        """
        if self.columns is not None:
            for piece, keep in self._pieces(grad, self._keep_vector(grad, grad.dtype)):
                piece.mul_(keep)
        for low, high in self._row_spans():
            grad[low:high].mul_(0)

    def decay_(self, param: Float[Tensor, " S"], decay: float) -> None:
        """Apply ``w <- w * (1 - decay)`` to elements that may change; frozen bits stay as they are.

        Args:
            param: Master weights of the slice, fp32, changed in place.
            decay: Learning rate times weight decay, >= 0.
        """
        if decay == 0.0:
            return
        spans = [(low, high, param[low:high].clone()) for low, high in self._row_spans()]
        if self.columns is None:
            param.mul_(1.0 - decay)
        else:
            trainable = self._keep_vector(param, torch.bool)
            factor = torch.where(trainable, 1.0 - decay, 1.0).to(param.dtype)
            for piece, part in self._pieces(param, factor):
                piece.mul_(part)
        for low, high, saved in spans:
            param[low:high] = saved

    def frozen_elements(self, flat: Tensor) -> Tensor:
        """Return a copy of the frozen elements of a slice: by columns, then by rows."""
        found = [flat[:0]]
        if self.columns is not None:
            for piece, frozen in self._pieces(flat, ~self._keep_vector(flat, torch.bool)):
                found.append(
                    piece[:, frozen].reshape(-1) if piece.dim() == 2 else piece[frozen].reshape(-1)
                )
        found += [flat[low:high] for low, high in self._row_spans()]
        return torch.cat(found)

    def num_frozen(self) -> int:
        """Return how many elements of the slice are frozen by columns or by rows (rows add)."""
        return int(self.frozen_elements(torch.empty(self.length, dtype=torch.bool)).numel())

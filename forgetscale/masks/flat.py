"""Freeze masks on flat slices of row-major matrices.

Element ``o`` of the flattened ``[out, in]`` tensor sits in column ``o % in`` and row ``o // in``.
So one flag per column and one per row of the slice decide every element, wherever a rank's border
falls: nothing is gathered and no mask of the tensor's size exists. A vector ``[n]`` is one row of
``n`` columns.

Shape letters: S elements of a slice, O rows, I columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

Axis = Literal["columns", "rows"]


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


def by_column(vector: Float[Tensor, " I"], start: int, length: int) -> Float[Tensor, " S"]:
    """Return each element's column value for one slice.

    Args:
        vector: One value per column.
        start: First element of the slice in the flattened matrix.
        length: Elements in the slice.
    """
    width = vector.numel()
    turned = vector.roll(-(start % width))
    return turned.repeat(-(-length // width))[:length]


def row_power_sums(
    flat: Float[Tensor, " S"],
    start: int,
    width: int,
    height: int,
    power: int,
    column_weights: Float[Tensor, " I"] | None = None,
) -> Float[Tensor, " O"]:
    """Return ``sum_j (|w_ij| c_j)^power`` per row over one slice, in fp64 (add over ranks).

    Args:
        flat: Slice of the flattened matrix, without padding.
        start: First element of the slice in the flattened matrix.
        width: Columns of the matrix.
        height: Rows of the matrix; rows outside the slice get 0.
        power: 1 or 2.
        column_weights: One factor ``c_j`` per column; None means 1.
    """
    if power not in (1, 2):
        raise ValueError(f"power must be 1 or 2, got {power}")
    sums = torch.zeros(height, dtype=torch.float64, device=flat.device)
    weights = None if column_weights is None else column_weights.to(flat.device, torch.float64)
    for row, first, piece in matrix_pieces(flat, start, flat.numel(), width):
        values = piece.double().abs_()
        if weights is not None:
            values *= weights[first : first + piece.shape[1]]
        sums[row : row + piece.shape[0]] += (values if power == 1 else values.square_()).sum(1)
    return sums


def matrix_pieces(
    flat: Tensor, start: int, length: int, width: int
) -> Iterator[tuple[int, int, Tensor]]:
    """Cut a slice into views of whole or partial rows: ``(first row, first column, [o, i])``.

    Args:
        flat: The slice.
        start: Its first element in the flattened matrix.
        length: Elements of it to cut.
        width: Columns of the matrix.
    """
    head, body = split_rows(start, length, width)
    row, first = divmod(start, width)
    if head:
        yield row, first, flat[:head].view(1, -1)
        row += 1
    if body:
        yield row, 0, flat[head : head + body].view(-1, width)
    if length - head - body:
        yield row + body // width, 0, flat[head + body : length].view(1, -1)


@dataclass(frozen=True, slots=True)
class SliceMask:
    """A freeze plan's view of one slice of one parameter, by columns and rows.

    Args:
        start: First element of the slice in the flattened parameter.
        length: Elements in the slice, padding excluded.
        width: Columns (``in_features``; ``n`` for a vector).
        columns: Sorted indices of frozen columns, or None.
        rows: Sorted indices of frozen rows, or None; those the slice does not touch are left out.
    """

    start: int
    length: int
    width: int
    columns: Int64[Tensor, " frozen_columns"] | None = None
    rows: Int64[Tensor, " frozen_rows"] | None = None
    _keep: dict[tuple[str, torch.dtype, torch.device], Tensor] = field(default_factory=dict)

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

    def _keep_vector(self, axis: Axis, like: Tensor, dtype: torch.dtype = torch.bool) -> Tensor:
        """Return 0 for columns of the matrix, or rows of the slice, that may not change, else 1."""
        key = (axis, dtype, like.device)
        if key not in self._keep:
            first = self.start // self.width
            last = -(-(self.start + self.length) // self.width)
            keep = torch.ones(self.width if axis == "columns" else last - first, dtype=dtype)
            index = self.columns if axis == "columns" else self.rows
            assert index is not None
            keep[index if axis == "columns" else index - first] = 0
            self._keep[key] = keep.to(like.device)
        return self._keep[key]

    def _pieces(self, flat: Tensor) -> Iterator[tuple[Tensor, slice, slice]]:
        """Yield ``[rows, columns]`` views with the columns of the matrix and rows of the slice."""
        top = self.start // self.width
        for row, column, piece in matrix_pieces(flat, self.start, self.length, self.width):
            height, width = piece.shape
            yield piece, slice(column, column + width), slice(row - top, row - top + height)

    def zero_frozen_(self, grad: Float[Tensor, " S"]) -> None:
        """Zero frozen elements of a gradient slice in place.

        They are multiplied by zero, not overwritten: a NaN there stays a NaN and is noticed.
        """
        for piece, columns, rows in self._pieces(grad):
            if self.columns is not None:
                piece.mul_(self._keep_vector("columns", grad, grad.dtype)[columns])
            if self.rows is not None:
                piece.mul_(self._keep_vector("rows", grad, grad.dtype)[rows, None])

    def decay_(self, param: Float[Tensor, " S"], decay: float) -> None:
        """Apply ``w <- w * (1 - decay)`` to elements that may change; frozen bits stay as they are.

        Args:
            param: Master weights of the slice, fp32, changed in place.
            decay: Learning rate times weight decay, >= 0.
        """
        if decay == 0.0:
            return
        if self.columns is None and self.rows is None:
            param.mul_(1.0 - decay)
            return
        for piece, columns, rows in self._pieces(param):
            if self.columns is None:
                piece.mul_(self._decay_factors("rows", param, decay)[rows, None])
                continue
            factors = self._decay_factors("columns", param, decay)[columns]
            if self.rows is None:
                piece.mul_(factors)
                continue
            frozen = ~self._keep_vector("rows", param)[rows]
            saved = piece[frozen]
            piece.mul_(factors)
            piece[frozen] = saved

    def _decay_factors(self, axis: Axis, param: Tensor, decay: float) -> Tensor:
        keep = self._keep_vector(axis, param)
        return torch.where(keep, 1.0 - decay, 1.0).to(param.dtype)

    def frozen_elements(self, flat: Tensor) -> Tensor:
        """Return a copy of the frozen elements of a slice: by columns, then by rows."""
        found = [flat[:0]]
        if self.columns is not None:
            for piece, columns, _ in self._pieces(flat):
                found.append(piece[:, ~self._keep_vector("columns", flat)[columns]].reshape(-1))
        if self.rows is not None:
            for piece, _, rows in self._pieces(flat):
                found.append(piece[~self._keep_vector("rows", flat)[rows]].reshape(-1))
        return torch.cat(found)

    def num_frozen(self) -> int:
        """Return how many elements of the slice are frozen by columns or by rows (rows add)."""
        return int(self.frozen_elements(torch.empty(self.length, dtype=torch.bool)).numel())

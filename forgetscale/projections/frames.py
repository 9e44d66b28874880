"""Orthonormal frames of a subspace of weight changes, on the slice of a matrix a rank holds.

A frame looks at a slice twice. ``sketch`` says what this rank contributes to the coefficients; the
sum of all ranks' sketches is the ``total``; ``filter`` then makes this rank's slice of
``sum_i f_i P_i x`` from it, with one factor per direction. Projection, the gradient of a quadratic
penalty and its proximal step are all such filters. What is summed is all that travels.

Slices are row-major and may start and end in the middle of a row (see ``masks.flat``). Padding is
no part of a slice.

Shape letters: S elements of a slice, O rows, I columns, m directions, k directions on the right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from forgetscale.masks.flat import matrix_pieces

AllReduce = Callable[[Tensor], Tensor]
"""Sum over ranks. Collective: every rank must call it."""
Kind = Literal["local", "coefficients", "left", "border_rows"]


@dataclass(frozen=True, slots=True)
class Communication:
    """What one look at one matrix sends, over all ranks together counted once."""

    kind: Kind
    """``local``: nothing but sums for reports; ``coefficients``: one number a direction;
    ``left``: directions times columns; ``border_rows``: directions times rows that ranks share."""
    floats: int
    """Numbers summed over ranks."""


@dataclass(frozen=True, slots=True)
class Place:
    """Which elements of a matrix this rank holds. A vector is one row."""

    shape: tuple[int, ...]
    start: int
    """First element in the flattened matrix."""
    length: int

    @property
    def width(self) -> int:
        """Columns."""
        return self.shape[-1]

    @property
    def height(self) -> int:
        """Rows."""
        return math.prod(self.shape) // self.width

    @property
    def rows(self) -> range:
        """Rows of which at least one element is here."""
        if self.length == 0:
            return range(0)
        return range(self.start // self.width, -(-(self.start + self.length) // self.width))

    def pieces(self, flat: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
        """Yield ``(rows counted from the first one here, columns, view [rows, columns])``."""
        top = self.start // self.width
        for row, column, view in matrix_pieces(flat, self.start, self.length, self.width):
            height, width = view.shape
            yield slice(row - top, row - top + height), slice(column, column + width), view

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> Place:
        """Return the place of a matrix one process holds alone."""
        return cls(shape, 0, math.prod(shape))


def find_cut_rows(place: Place, all_reduce: AllReduce) -> Tensor:
    """Return the sorted rows of a matrix that no rank holds whole.

    Args:
        place: This rank's slice.
        all_reduce: Sum over ranks (one number a row, once).

    Collective: every rank must call it.
    """
    found = torch.zeros(place.height)
    for rows, columns, _ in place.pieces(torch.empty(place.length, device="meta")):
        if columns.stop - columns.start < place.width:
            found[place.rows[rows.start]] = 1
    return all_reduce(found).nonzero().flatten()


class Frame(Protocol):
    """Directions in the space of one matrix's changes."""

    directions: tuple[int, ...]
    """Shape of factors and energies."""

    @property
    def communication(self) -> Communication:
        """Return what one look sends."""

    def sketch(self, x: Tensor) -> Tensor:
        """Return what this rank adds to the total, ``[floats]``."""

    def energies(self, total: Tensor) -> Tensor:
        """Return ``||P_i x||^2`` of each direction over all ranks."""

    def filter(self, x: Tensor, total: Tensor, factors: Tensor) -> Tensor:
        """Return this rank's slice of ``sum_i f_i P_i x``, ``[S]``."""


def _require_columns(basis: Tensor, rows: int, what: str) -> None:
    if basis.dim() != 2 or basis.shape[0] != rows:
        raise ValueError(
            f"{what} must have {rows} rows, got {list(basis.shape)}; it belongs to another matrix"
            " or slice"
        )


class VectorFrame:
    """Directions of the flattened matrix: coefficients are m numbers for the whole matrix.

    Args:
        place: The slice.
        basis: ``[S, m]``, the slice's rows of the orthonormal columns.
    """

    def __init__(self, place: Place, basis: Tensor) -> None:
        _require_columns(basis, place.length, "a basis over the flattened matrix")
        self._basis = basis
        self.directions: tuple[int, ...] = (basis.shape[1],)

    @property
    def communication(self) -> Communication:
        """Return m numbers."""
        return Communication("coefficients", self.directions[0])

    def sketch(self, x: Tensor) -> Tensor:
        """Return ``U_s^T x_s``."""
        return self._basis.t() @ x

    def energies(self, total: Tensor) -> Tensor:
        """Return the squared coefficients."""
        return total.square()

    def filter(self, x: Tensor, total: Tensor, factors: Tensor) -> Tensor:
        """Return ``U_s (f * c)``."""
        return self._basis @ (factors * total)


class LeftFrame:
    """Directions on the output side: ``C = U^T dW``, m times as many numbers as columns.

    Args:
        place: The slice.
        basis: ``[O, m]``, orthonormal columns; only rows of the slice are kept.
    """

    def __init__(self, place: Place, basis: Tensor) -> None:
        _require_columns(basis, place.height, "a basis on the output side")
        self._place = place
        self._rows = basis[place.rows.start : place.rows.stop].clone()
        self.directions: tuple[int, ...] = (basis.shape[1],)

    @property
    def communication(self) -> Communication:
        """Return ``m x I`` numbers."""
        return Communication("left", self.directions[0] * self._place.width)

    def sketch(self, x: Tensor) -> Tensor:
        """Return this rank's part of ``U^T dW``, flattened."""
        found = x.new_zeros(self.directions[0], self._place.width)
        for rows, columns, view in self._place.pieces(x):
            found[:, columns] += self._rows[rows].t() @ view
        return found.view(-1)

    def energies(self, total: Tensor) -> Tensor:
        """Return the squared norms of the rows of ``C``."""
        return total.view(self.directions[0], -1).square().sum(1)

    def filter(self, x: Tensor, total: Tensor, factors: Tensor) -> Tensor:
        """Return the slice of ``U diag(f) C``."""
        inner = factors[:, None] * total.view(self.directions[0], -1)
        found = torch.empty_like(x)
        for rows, columns, view in self._place.pieces(found):
            torch.mm(self._rows[rows], inner[:, columns], out=view)
        return found


class RightFrame:
    """Directions on the input side: rows inside a slice need nothing, rows cut by a border do.

    Args:
        place: The slice.
        basis: ``[I, m]``, orthonormal columns.
        cut_rows: From ``find_cut_rows``.
    """

    def __init__(self, place: Place, basis: Tensor, cut_rows: Tensor) -> None:
        _require_columns(basis, place.width, "a basis on the input side")
        self._place, self._basis, self._cut = place, basis, cut_rows
        self.directions: tuple[int, ...] = (basis.shape[1],)
        self._at = {row: index for index, row in enumerate(cut_rows.tolist())}

    @property
    def communication(self) -> Communication:
        """Return m numbers for each cut row, and m sums of squares for reports."""
        count = self._cut.numel()
        return Communication("border_rows", self.directions[0] * (count + 1))

    def _shared(self, rows: slice, columns: slice) -> int | None:
        """Return the place of a piece's row among the cut ones, None for whole rows."""
        if columns.stop - columns.start == self._place.width:
            return None
        return self._at[self._place.rows[rows.start]]

    def sketch(self, x: Tensor) -> Tensor:
        """Return parts of ``dW V`` for cut rows, then squares of whole rows by direction."""
        found = x.new_zeros(self._cut.numel() + 1, self.directions[0])
        for rows, columns, view in self._place.pieces(x):
            inner = view @ self._basis[columns]
            index = self._shared(rows, columns)
            if index is None:
                found[-1] += inner.square().sum(0)
            else:
                found[index] += inner[0]
        return found.view(-1)

    def energies(self, total: Tensor) -> Tensor:
        """Return the squared norms of the columns of ``dW V``."""
        parts = total.view(-1, self.directions[0])
        return parts[-1] + parts[:-1].square().sum(0)

    def filter(self, x: Tensor, total: Tensor, factors: Tensor) -> Tensor:
        """Return the slice of ``dW V diag(f) V^T``."""
        parts = total.view(-1, self.directions[0])
        found = torch.empty_like(x)
        out = [view for _, _, view in self._place.pieces(found)]
        for target, (rows, columns, view) in zip(out, self._place.pieces(x), strict=True):
            basis = self._basis[columns]
            index = self._shared(rows, columns)
            inner = view @ basis if index is None else parts[index][None]
            torch.mm(inner * factors, basis.t(), out=target)
        return found


class TwoSidedFrame:
    """Directions ``u_i v_j^T``: ``K = U^T dW V``, m times k numbers.

    Args:
        place: The slice.
        left: ``[O, m]``, orthonormal columns.
        right: ``[I, k]``, orthonormal columns.
    """

    def __init__(self, place: Place, left: Tensor, right: Tensor) -> None:
        _require_columns(left, place.height, "a basis on the output side")
        _require_columns(right, place.width, "a basis on the input side")
        self._place, self._right = place, right
        self._rows = left[place.rows.start : place.rows.stop].clone()
        self.directions: tuple[int, ...] = (left.shape[1], right.shape[1])

    @property
    def communication(self) -> Communication:
        """Return ``m x k`` numbers."""
        return Communication("coefficients", math.prod(self.directions))

    def sketch(self, x: Tensor) -> Tensor:
        """Return this rank's part of ``U^T dW V``, flattened."""
        found = x.new_zeros(self.directions)
        for rows, columns, view in self._place.pieces(x):
            found += self._rows[rows].t() @ (view @ self._right[columns])
        return found.view(-1)

    def energies(self, total: Tensor) -> Tensor:
        """Return the squared entries of ``K``."""
        return total.view(self.directions).square()

    def filter(self, x: Tensor, total: Tensor, factors: Tensor) -> Tensor:
        """Return the slice of ``U (f * K) V^T``."""
        inner = factors * total.view(self.directions)
        found = torch.empty_like(x)
        for rows, columns, view in self._place.pieces(found):
            torch.mm(self._rows[rows] @ inner, self._right[columns].t(), out=view)
        return found


class MaskFrame:
    """Chosen elements: one direction for all of them together, nothing travels but a sum.

    Args:
        place: The slice.
        mask: ``[S]`` bool, True for the chosen.
    """

    directions: tuple[int, ...] = (1,)

    def __init__(self, place: Place, mask: Tensor) -> None:
        if mask.dtype != torch.bool or mask.shape != (place.length,):
            raise ValueError(
                f"mask must be bool [{place.length}], got {mask.dtype} {list(mask.shape)}"
            )
        self._mask = mask

    @property
    def communication(self) -> Communication:
        """Return one sum, for reports."""
        return Communication("local", 1)

    def sketch(self, x: Tensor) -> Tensor:
        """Return the squares of the chosen elements here."""
        return x[self._mask].square().sum().view(1)

    def energies(self, total: Tensor) -> Tensor:
        """Return the squares of the chosen elements."""
        return total

    def filter(self, x: Tensor, total: Tensor, factors: Tensor) -> Tensor:
        """Return the chosen elements times the factor, 0 elsewhere."""
        return torch.where(self._mask, x * factors, 0.0)

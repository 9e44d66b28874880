"""Orthogonal projectors on slices, made of frames.

Every one satisfies ``P P = P`` and ``P = P^T``, on one process and cut over any number.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from forgetscale.projections.frames import Communication, Frame, LeftFrame, Place, RightFrame


class Projector(Protocol):
    """A linear map of one matrix's changes, on the slice a rank holds."""

    @property
    def communication(self) -> Communication:
        """Return what one use sends."""

    def sketch(self, x: Tensor) -> Tensor:
        """Return what this rank adds to the total, ``[floats]``."""

    def apply(self, x: Tensor, total: Tensor) -> Tensor:
        """Return this rank's slice of ``P x``, ``[S]``."""

    def energy(self, total: Tensor, square: Tensor) -> Tensor:
        """Return ``||P x||^2`` over all ranks, given ``||x||^2``; both ``[]``."""


class Onto:
    """Projector onto a frame.

    Args:
        frame: The directions that are kept.
    """

    def __init__(self, frame: Frame) -> None:
        self.frame = frame
        self._ones = torch.ones(frame.directions)

    @property
    def communication(self) -> Communication:
        """Return what the frame sends."""
        return self.frame.communication

    def sketch(self, x: Tensor) -> Tensor:
        """Return the frame's sketch."""
        return self.frame.sketch(x)

    def apply(self, x: Tensor, total: Tensor) -> Tensor:
        """Return the part of ``x`` inside the frame."""
        return self.frame.filter(x, total, self._ones.to(x))

    def energy(self, total: Tensor, square: Tensor) -> Tensor:
        """Return the sum over directions."""
        return self.frame.energies(total).sum()


class Complement:
    """Projector onto what another one leaves; the two parts sum to ``x`` exactly as rounded.

    Args:
        inner: The other projector.
    """

    def __init__(self, inner: Projector) -> None:
        self.inner = inner

    @property
    def communication(self) -> Communication:
        """Return what the other one sends."""
        return self.inner.communication

    def sketch(self, x: Tensor) -> Tensor:
        """Return the other one's sketch."""
        return self.inner.sketch(x)

    def apply(self, x: Tensor, total: Tensor) -> Tensor:
        """Return ``x - P x``."""
        return x - self.inner.apply(x, total)

    def energy(self, total: Tensor, square: Tensor) -> Tensor:
        """Return what the other one leaves."""
        return square - self.inner.energy(total, square)


class TwoSidedComplement:
    """``(I - U U^T) dW (I - V V^T)`` of OPLoRA and OSF: leading triples of a weight stay.

    Both sides are looked at once: what the left projection takes from ``dW V`` follows from
    ``U^T dW``, which every rank then has.

    Args:
        place: The slice.
        left: ``[O, m]``, orthonormal columns.
        right: ``[I, k]``, orthonormal columns.
        cut_rows: From ``find_cut_rows``.
    """

    def __init__(self, place: Place, left: Tensor, right: Tensor, cut_rows: Tensor) -> None:
        self._left = Onto(LeftFrame(place, left))
        self._right = Onto(RightFrame(place, right, cut_rows))
        self._cut_left = left[cut_rows]
        self._basis = right
        self._sizes = [self._left.communication.floats, self._right.communication.floats]

    @property
    def communication(self) -> Communication:
        """Return ``m x I`` numbers and the cut rows."""
        return Communication("left", sum(self._sizes))

    def sketch(self, x: Tensor) -> Tensor:
        """Return both sketches."""
        return torch.cat([self._left.sketch(x), self._right.sketch(x)])

    def apply(self, x: Tensor, total: Tensor) -> Tensor:
        """Return the slice with both sides projected out."""
        of_left, of_right = torch.split(total, self._sizes)
        rest = x - self._left.apply(x, of_left)
        inner = of_left.view(-1, self._basis.shape[0]) @ self._basis
        cut = of_right.view(-1, self._basis.shape[1]).clone()
        cut[:-1] -= self._cut_left @ inner
        return rest - self._right.apply(rest, cut.view(-1))

    def energy(self, total: Tensor, square: Tensor) -> Tensor:
        """Return the norm by inclusion and exclusion of the two sides."""
        of_left, of_right = torch.split(total, self._sizes)
        both = of_left.view(-1, self._basis.shape[0]) @ self._basis
        one_side = self._left.energy(of_left, square) + self._right.energy(of_right, square)
        found: Tensor = square - one_side + both.square().sum()
        return found

"""Quadratic forms ``x^T M x`` of a weight change, on slices: value, gradient, proximal step.

Every one has ``value(0) = 0``, ``value >= 0`` and a gradient that is its derivative. The proximal
step is the exact minimiser of ``x'^T M x' + ||x' - x||^2 / (2 h)``, so it is stable for any
strength; the gradient is not: a step ``h`` along it diverges where ``h 2 mu > 2`` for the largest
eigenvalue ``mu`` of ``M``.

Shape letters: S elements of a slice.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from forgetscale.projections.frames import Communication, Frame


class Metric(Protocol):
    """A positive semi-definite form, on the slice a rank holds."""

    @property
    def communication(self) -> Communication:
        """Return what one look sends."""

    @property
    def largest(self) -> float:
        """Return the largest eigenvalue (of this slice where the form is diagonal)."""

    def sketch(self, x: Tensor) -> Tensor:
        """Return what this rank adds to the total, ``[floats]``."""

    def value(self, total: Tensor) -> Tensor:
        """Return ``x^T M x`` over all ranks, ``[]``."""

    def gradient(self, x: Tensor, total: Tensor) -> Tensor:
        """Return this rank's slice of ``2 M x``, ``[S]``."""

    def prox(self, x: Tensor, total: Tensor, step: float) -> Tensor:
        """Return this rank's slice of the proximal point, ``[S]``."""


class IdentityMetric:
    """``strength ||x||^2`` (L2-SP, Lisa).

    Args:
        strength: >= 0.
    """

    def __init__(self, strength: float) -> None:
        self.largest = strength

    @property
    def communication(self) -> Communication:
        """Return one sum."""
        return Communication("local", 1)

    def sketch(self, x: Tensor) -> Tensor:
        """Return the squares here."""
        return x.square().sum().view(1)

    def value(self, total: Tensor) -> Tensor:
        """Return the norm times the strength."""
        return self.largest * total[0]

    def gradient(self, x: Tensor, total: Tensor) -> Tensor:
        """Return ``2 strength x``."""
        return 2 * self.largest * x

    def prox(self, x: Tensor, total: Tensor, step: float) -> Tensor:
        """Return ``x`` shrunk by one factor."""
        return x / (1 + 2 * step * self.largest)


class DiagonalMetric:
    """``strength sum_i F_i x_i^2`` (EWC, EWC-LoRA); nothing travels but its value.

    Args:
        diagonal: ``[S]``, >= 0.
        strength: >= 0.
    """

    def __init__(self, diagonal: Tensor, strength: float) -> None:
        if diagonal.numel() and float(diagonal.min()) < 0:
            raise ValueError(f"a diagonal metric must be >= 0, got {float(diagonal.min())}")
        self._diagonal, self._strength = diagonal, strength

    @property
    def largest(self) -> float:
        """Return the largest entry here times the strength."""
        return self._strength * float(self._diagonal.max()) if self._diagonal.numel() else 0.0

    @property
    def communication(self) -> Communication:
        """Return one sum."""
        return Communication("local", 1)

    def sketch(self, x: Tensor) -> Tensor:
        """Return the value of the elements here."""
        return (self._strength * (self._diagonal * x) @ x).view(1)

    def value(self, total: Tensor) -> Tensor:
        """Return the sum of all ranks' values."""
        return total[0]

    def gradient(self, x: Tensor, total: Tensor) -> Tensor:
        """Return ``2 strength F x``."""
        return 2 * self._strength * self._diagonal * x

    def prox(self, x: Tensor, total: Tensor, step: float) -> Tensor:
        """Return every element shrunk by its own factor."""
        return x / (1 + 2 * step * self._strength * self._diagonal)


class FrameMetric:
    """``sum_i lam_i ||P_i x||^2 + outside ||x - P x||^2``: AlignGuard, Kronecker anchors, AsFT.

    Args:
        frame: Directions ``P_i``.
        values: ``lam``, in the shape of the frame's directions, >= 0.
        outside: Ridge on the complement of the frame, >= 0.
    """

    def __init__(self, frame: Frame, values: Tensor, outside: float = 0.0) -> None:
        if tuple(values.shape) != frame.directions:
            raise ValueError(
                f"values must have shape {list(frame.directions)}, one per direction, got"
                f" {list(values.shape)}"
            )
        if float(values.min()) < 0 or outside < 0:
            raise ValueError(f"values must be >= 0, got {float(values.min())} and {outside}")
        self.frame, self._values, self._outside = frame, values, outside

    @property
    def largest(self) -> float:
        """Return the largest value."""
        return max(float(self._values.max()), self._outside)

    @property
    def communication(self) -> Communication:
        """Return what the frame sends, and a norm where the complement counts."""
        found = self.frame.communication
        return Communication(found.kind, found.floats + (self._outside > 0))

    def sketch(self, x: Tensor) -> Tensor:
        """Return the frame's sketch, then the squares here where they count."""
        found = self.frame.sketch(x)
        return torch.cat([found, x.square().sum().view(1)]) if self._outside > 0 else found

    def _inside(self, total: Tensor) -> Tensor:
        return total[: self.frame.communication.floats]

    def value(self, total: Tensor) -> Tensor:
        """Return both terms."""
        energies = self.frame.energies(self._inside(total))
        found = (self._values.to(energies) * energies).sum()
        if self._outside > 0:
            # Rounding may leave the difference of two norms below zero.
            found = found + self._outside * (total[-1] - energies.sum()).clamp_min(0)
        return found

    def gradient(self, x: Tensor, total: Tensor) -> Tensor:
        """Return ``2 M x``."""
        values = self._values.to(x) - self._outside
        found = 2 * self.frame.filter(x, self._inside(total), values)
        return found if self._outside == 0 else found.add_(x, alpha=2 * self._outside)

    def prox(self, x: Tensor, total: Tensor, step: float) -> Tensor:
        """Return each direction, and the rest, shrunk by its own factor."""
        rest = 1 / (1 + 2 * step * self._outside)
        shrink = 1 / (1 + 2 * step * self._values.to(x))
        found = self.frame.filter(x, self._inside(total), shrink - rest)
        return found.add_(x, alpha=rest)

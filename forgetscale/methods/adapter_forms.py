"""Quadratic forms of an adapter's update ``s B A``: energies by direction, gradients of factors.

Whole factors are small and gathered; a form that acts on a side of the matrix needs nothing else
and is computed alike on every rank. A form that looks at single elements is shared: each rank takes
its rows of the update, and the results are summed over ranks.

Shape letters: O out features, I in features, r adapter rank, m directions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from forgetscale.ops.factors import (
    FactorPull,
    diagonal_pull,
    identity_pull,
    left_pull,
    right_pull,
    two_sided_pull,
    vector_coefficients,
    vector_gradients,
)


class Factors(NamedTuple):
    """The whole factors of one matrix."""

    a: Tensor
    """``[r, I]``."""
    b: Tensor
    """``[O, r]``."""
    scale: float


class Form(ABC):
    """``strength sum_i lam_i ||P_i x||^2 + outside (||x||^2 - sum_i ||P_i x||^2)``.

    Args:
        values: ``lam`` by direction.
        strength: >= 0.
        outside: >= 0.
    """

    shared = False
    """True if a rank's results are parts, to be summed over ranks."""

    def __init__(self, values: Tensor, strength: float, outside: float) -> None:
        self.values, self.strength, self.outside = values, strength, outside

    def move(self, device: torch.device) -> None:
        """Put everything where the factors are."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor) and value.device != device:
                setattr(self, name, value.to(device))

    def sketch(self, factors: Factors) -> Tensor:
        """Return what ranks must add before ``energies`` and ``pull``; often nothing."""
        return factors.a.new_zeros(0)

    @abstractmethod
    def energies(self, factors: Factors, total: Tensor) -> Tensor:
        """Return ``||P_i x||^2``, in the shape of ``values``; of this rank's rows if shared."""

    @abstractmethod
    def weighted(self, factors: Factors, total: Tensor, weights: Tensor) -> FactorPull:
        """Return gradients of ``sum_i w_i ||P_i x||^2``; of this rank's rows if shared."""

    def pull(self, factors: Factors, total: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of the form in ``A`` and ``B`` (parts of them if shared)."""
        weights = self.strength * self.values.to(factors.a) - self.outside
        found = self.weighted(factors, total, weights)
        return found.lora_a, found.lora_b

    def value(self, energies: Tensor, square: Tensor) -> Tensor:
        """Return the form, given all energies and ``||x||^2``."""
        inside = (self.strength * self.values.to(energies) * energies).sum()
        return inside + self.outside * (square - energies.sum()).clamp_min(0)


class NoDirections(Form):
    """The identity: everything is outside.

    Args:
        strength: >= 0.
    """

    def __init__(self, strength: float) -> None:
        super().__init__(torch.zeros(0), 0.0, strength)

    def energies(self, factors: Factors, total: Tensor) -> Tensor:
        """Return none."""
        return factors.a.new_zeros(0)

    def weighted(self, factors: Factors, total: Tensor, weights: Tensor) -> FactorPull:
        """Return zeros."""
        zero = factors.a.new_zeros(())
        return FactorPull(zero, torch.zeros_like(factors.a), torch.zeros_like(factors.b))


class LeftForm(Form):
    """Directions on the output side.

    Args:
        basis: ``[O, m]``.
        values: ``[m]``.
        strength: See ``Form``.
        outside: See ``Form``.
    """

    def __init__(self, basis: Tensor, values: Tensor, strength: float, outside: float) -> None:
        super().__init__(values, strength, outside)
        self.basis = basis

    def energies(self, factors: Factors, total: Tensor) -> Tensor:
        """Return the squared rows of ``U^T dW``."""
        seen = self.basis.t() @ factors.b
        return factors.scale**2 * ((seen @ (factors.a @ factors.a.t())) * seen).sum(1)

    def weighted(self, factors: Factors, total: Tensor, weights: Tensor) -> FactorPull:
        """Return the closed form."""
        return left_pull(self.basis, weights, factors.a, factors.b, factors.scale)


class RightForm(Form):
    """Directions on the input side.

    Args:
        basis: ``[I, m]``.
        values: ``[m]``.
        strength: See ``Form``.
        outside: See ``Form``.
    """

    def __init__(self, basis: Tensor, values: Tensor, strength: float, outside: float) -> None:
        super().__init__(values, strength, outside)
        self.basis = basis

    def energies(self, factors: Factors, total: Tensor) -> Tensor:
        """Return the squared columns of ``dW V``."""
        seen = factors.a @ self.basis
        return factors.scale**2 * (((factors.b.t() @ factors.b) @ seen) * seen).sum(0)

    def weighted(self, factors: Factors, total: Tensor, weights: Tensor) -> FactorPull:
        """Return the closed form."""
        return right_pull(self.basis, weights, factors.a, factors.b, factors.scale)


class TwoSidedForm(Form):
    """Directions ``u_i v_j^T``.

    Args:
        left: ``[O, m]``.
        right: ``[I, k]``.
        values: ``[m, k]``.
        strength: See ``Form``.
        outside: See ``Form``.
    """

    def __init__(
        self, left: Tensor, right: Tensor, values: Tensor, strength: float, outside: float
    ) -> None:
        super().__init__(values, strength, outside)
        self._left, self._right = left, right

    def energies(self, factors: Factors, total: Tensor) -> Tensor:
        """Return the squared entries of ``U^T dW V``."""
        inner = (self._left.t() @ factors.b) @ (factors.a @ self._right)
        return (factors.scale * inner).square()

    def weighted(self, factors: Factors, total: Tensor, weights: Tensor) -> FactorPull:
        """Return the closed form."""
        return two_sided_pull(self._left, self._right, weights, factors.a, factors.b, factors.scale)


class VectorForm(Form):
    """Directions of the flattened matrix; this rank holds those of its rows.

    Args:
        basis: ``[rows * I, m]``.
        rows: Rows of the matrix that are this rank's.
        values: ``[m]``.
        strength: See ``Form``.
        outside: See ``Form``.
    """

    shared = True

    def __init__(
        self, basis: Tensor, rows: slice, values: Tensor, strength: float, outside: float
    ) -> None:
        super().__init__(values, strength, outside)
        self._basis, self._rows = basis, rows

    def sketch(self, factors: Factors) -> Tensor:
        """Return this rank's part of the coefficients."""
        return vector_coefficients(self._basis, factors.a, factors.b[self._rows], factors.scale)

    def energies(self, factors: Factors, total: Tensor) -> Tensor:
        """Return the squared coefficients."""
        return total.square()

    def weighted(self, factors: Factors, total: Tensor, weights: Tensor) -> FactorPull:
        """Return the parts of this rank's rows."""
        of_a, of_b = vector_gradients(
            self._basis, 2 * weights * total, factors.a, factors.b[self._rows], factors.scale
        )
        whole = torch.zeros_like(factors.b)
        whole[self._rows] = of_b
        return FactorPull(total.new_zeros(()), of_a, whole)


class DiagonalForm(Form):
    """``strength sum F x^2``; this rank holds ``F`` of its rows.

    Args:
        diagonal: ``[rows, I]``.
        rows: Rows of the matrix that are this rank's.
        strength: >= 0.
    """

    shared = True

    def __init__(self, diagonal: Tensor, rows: slice, strength: float) -> None:
        super().__init__(torch.ones(1), strength, 0.0)
        self._diagonal, self._rows = diagonal, rows

    def sketch(self, factors: Factors) -> Tensor:
        """Return this rank's part of ``sum F x^2``."""
        found = diagonal_pull(self._diagonal, factors.a, factors.b[self._rows], factors.scale)
        return found.value.view(1)

    def energies(self, factors: Factors, total: Tensor) -> Tensor:
        """Return the sum."""
        return total

    def weighted(self, factors: Factors, total: Tensor, weights: Tensor) -> FactorPull:
        """Return the parts of this rank's rows."""
        found = diagonal_pull(self._diagonal, factors.a, factors.b[self._rows], factors.scale)
        whole = torch.zeros_like(factors.b)
        whole[self._rows] = weights * found.lora_b
        return FactorPull(found.value, weights * found.lora_a, whole)


def norm_pull(factors: Factors, weight: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``||x||^2`` and the gradients of ``weight ||x||^2`` in ``A`` and ``B``.

    Args:
        factors: Whole factors.
        weight: >= 0.
    """
    found = identity_pull(factors.a, factors.b, factors.scale)
    return found.value, weight * found.lora_a, weight * found.lora_b

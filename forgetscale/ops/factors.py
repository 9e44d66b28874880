"""Penalties on the change ``dW = s B A`` of an adapter: values and gradients of the factors.

Where a basis acts on one side of the matrix, or on both, ``dW`` is never formed: what is needed are
products of the factors with the basis, ``r`` wide. Where it looks at single elements (a diagonal, a
basis over the flattened matrix) a few rows of ``dW`` exist at a time. Values do not depend on the
gauge: ``(B R, R^-1 A)`` and ``(2 B, A, s / 2)`` give the same.

Shape letters: O out features, I in features, D = O * I weights in row-major order, r adapter rank,
m, k retained directions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

ROWS_AT_A_TIME = 256
"""Rows of ``dW`` that exist at one time where a penalty looks at single elements."""


class FactorPull(NamedTuple):
    """A penalty's value and its gradients in the two factors."""

    value: Tensor
    """``[]``."""
    lora_a: Tensor
    """``[r, I]``."""
    lora_b: Tensor
    """``[O, r]``."""


def factor_gradients(
    grad: Float[Tensor, "O I"],
    lora_a: Float[Tensor, "r I"],
    lora_b: Float[Tensor, "O r"],
    scale: float,
) -> tuple[Float[Tensor, "r I"], Float[Tensor, "O r"]]:
    """Carry a gradient in ``dW`` over to the factors of ``dW = s B A``.

    Args:
        grad: Gradient in ``dW``.
        lora_a: ``A``.
        lora_b: ``B``.
        scale: ``s``, the factor the adapter's product is multiplied by when it is applied.

    Returns:
        ``s B^T G`` and ``s G A^T``.
    """
    return scale * (lora_b.t() @ grad), scale * (grad @ lora_a.t())


def identity_pull(
    lora_a: Float[Tensor, "r I"], lora_b: Float[Tensor, "O r"], scale: float
) -> FactorPull:
    """Return ``||dW||_F^2`` and its gradients, from two ``r x r`` matrices.

    Args:
        lora_a: ``A``.
        lora_b: ``B``.
        scale: ``s``.
    """
    inside, outside = lora_a @ lora_a.t(), lora_b.t() @ lora_b
    square = scale * scale
    return FactorPull(
        square * (inside * outside).sum(),
        2 * square * outside @ lora_a,
        2 * square * lora_b @ inside,
    )


def left_pull(
    basis: Float[Tensor, "O m"],
    values: Float[Tensor, " m"],
    lora_a: Float[Tensor, "r I"],
    lora_b: Float[Tensor, "O r"],
    scale: float,
) -> FactorPull:
    """Return ``tr(dW^T U Lam U^T dW)`` and its gradients.

    Args:
        basis: ``U``, directions on the output side.
        values: ``Lam``, >= 0.
        lora_a: ``A``.
        lora_b: ``B``.
        scale: ``s``.
    """
    seen = basis.t() @ lora_b
    inside = lora_a @ lora_a.t()
    weighted = values[:, None] * seen
    outside = seen.t() @ weighted
    square = scale * scale
    return FactorPull(
        square * (inside * outside).sum(),
        2 * square * outside @ lora_a,
        2 * square * basis @ (weighted @ inside),
    )


def right_pull(
    basis: Float[Tensor, "I m"],
    values: Float[Tensor, " m"],
    lora_a: Float[Tensor, "r I"],
    lora_b: Float[Tensor, "O r"],
    scale: float,
) -> FactorPull:
    """Return ``tr(dW V Lam V^T dW^T)`` and its gradients.

    Args:
        basis: ``V``, directions on the input side.
        values: ``Lam``, >= 0.
        lora_a: ``A``.
        lora_b: ``B``.
        scale: ``s``.
    """
    found = left_pull(basis, values, lora_b.t(), lora_a.t(), scale)
    return FactorPull(found.value, found.lora_b.t(), found.lora_a.t())


def two_sided_pull(
    left: Float[Tensor, "O m"],
    right: Float[Tensor, "I k"],
    values: Float[Tensor, "m k"],
    lora_a: Float[Tensor, "r I"],
    lora_b: Float[Tensor, "O r"],
    scale: float,
) -> FactorPull:
    """Return ``sum_ij lam_ij (u_i^T dW v_j)^2`` and its gradients.

    With ``lam_ij = s_i c_j`` this is the Kronecker-factored ``tr(S dW C dW^T)`` on the kept
    directions.

    Args:
        left: ``U``.
        right: ``V``.
        values: ``lam``, >= 0.
        lora_a: ``A``.
        lora_b: ``B``.
        scale: ``s``.
    """
    seen_b, seen_a = left.t() @ lora_b, lora_a @ right
    inner = scale * seen_b @ seen_a
    pulled = values * inner
    return FactorPull(
        (pulled * inner).sum(),
        2 * scale * (seen_b.t() @ pulled) @ right.t(),
        2 * scale * left @ (pulled @ seen_a.t()),
    )


def _by_rows(
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    value_and_gradient: Callable[[Tensor, slice], tuple[Tensor, Tensor]],
) -> FactorPull:
    """Add up a penalty over blocks of rows of ``dW``; each block exists for a moment."""
    value = lora_a.new_zeros(())
    grad_a, grad_b = torch.zeros_like(lora_a), torch.zeros_like(lora_b)
    for first in range(0, lora_b.shape[0], ROWS_AT_A_TIME):
        rows = slice(first, min(first + ROWS_AT_A_TIME, lora_b.shape[0]))
        delta = scale * (lora_b[rows] @ lora_a)
        part, grad = value_and_gradient(delta, rows)
        of_a, of_b = factor_gradients(grad, lora_a, lora_b[rows], scale)
        value = value + part
        grad_a += of_a
        grad_b[rows] = of_b
    return FactorPull(value, grad_a, grad_b)


def diagonal_pull(
    diagonal: Float[Tensor, "O I"],
    lora_a: Float[Tensor, "r I"],
    lora_b: Float[Tensor, "O r"],
    scale: float,
) -> FactorPull:
    """Return ``sum_ij F_ij dW_ij^2`` and its gradients, a few rows at a time.

    Args:
        diagonal: ``F``, >= 0.
        lora_a: ``A``.
        lora_b: ``B``.
        scale: ``s``.

    Source:
        arXiv:2602.17559: the importance belongs to ``dW``; on the factors apart it is distorted.
    """

    def block(delta: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        pulled = diagonal[rows] * delta
        return (pulled * delta).sum(), 2 * pulled

    return _by_rows(lora_a, lora_b, scale, block)


def vector_coefficients(
    basis: Float[Tensor, "rows m"],
    lora_a: Float[Tensor, "r I"],
    lora_b: Float[Tensor, "O r"],
    scale: float,
) -> Float[Tensor, " m"]:
    """Return ``U^T vec(dW)``, a few rows of ``dW`` at a time.

    Args:
        basis: ``U`` over the flattened matrix, or the part of it that belongs to some rows.
        lora_a: ``A``.
        lora_b: ``B``, or those rows of it (add the results of all rows).
        scale: ``s``.

    Raises:
        ValueError: The basis is not one of that many weights.
    """
    width = lora_a.shape[1]
    if basis.shape[0] != lora_b.shape[0] * width:
        raise ValueError(
            f"the basis is for {basis.shape[0]} weights, the adapter changes"
            f" {lora_b.shape[0] * width}"
        )
    inner = basis.new_zeros(basis.shape[1])
    for first in range(0, lora_b.shape[0], ROWS_AT_A_TIME):
        delta = scale * (lora_b[first : first + ROWS_AT_A_TIME] @ lora_a)
        inner = inner + basis[first * width :][: delta.numel()].t() @ delta.reshape(-1)
    return inner


def vector_gradients(
    basis: Float[Tensor, "rows m"],
    pulled: Float[Tensor, " m"],
    lora_a: Float[Tensor, "r I"],
    lora_b: Float[Tensor, "O r"],
    scale: float,
) -> tuple[Float[Tensor, "r I"], Float[Tensor, "O r"]]:
    """Carry the gradient ``U pulled`` in ``vec(dW)`` over to the factors.

    Args:
        basis: As in ``vector_coefficients``.
        pulled: One number a direction.
        lora_a: ``A``.
        lora_b: ``B``, or some rows of it (then the gradient of ``A`` is their part of it).
        scale: ``s``.
    """
    width = lora_a.shape[1]

    def block(delta: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        part = basis[rows.start * width : rows.stop * width]
        return delta.new_zeros(()), (part @ pulled).view_as(delta)

    found = _by_rows(lora_a, lora_b, scale, block)
    return found.lora_a, found.lora_b


def vector_pull(
    basis: Float[Tensor, "D m"],
    values: Float[Tensor, " m"],
    lora_a: Float[Tensor, "r I"],
    lora_b: Float[Tensor, "O r"],
    scale: float,
) -> FactorPull:
    """Return ``sum_i lam_i <U_i, vec(dW)>^2`` and its gradients, a few rows of ``dW`` at a time.

    Args:
        basis: ``U`` over the flattened matrix.
        values: ``Lam``, >= 0.
        lora_a: ``A``.
        lora_b: ``B``.
        scale: ``s``.

    Raises:
        ValueError: The basis is not one of ``O * I`` weights.
    """
    inner = vector_coefficients(basis, lora_a, lora_b, scale)
    of_a, of_b = vector_gradients(basis, 2 * values * inner, lora_a, lora_b, scale)
    return FactorPull((values * inner.square()).sum(), of_a, of_b)

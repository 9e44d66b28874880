"""Two low-rank Fisher matrices made one: their mean, on the first span and what lies beside it.

Everything follows from the inner products of the two bases, so ranks that hold slices of the
directions add ``m x k`` numbers and each makes its own rows.

Shape letters: m directions of the first matrix, k of the second, n of the result.
"""

from __future__ import annotations

import torch
from jaxtyping import Float64
from torch import Tensor

LEAST_SHARE = 1e-4
"""A direction beside the first span counts if it holds this share of the largest eigenvalue."""


def merge_weights(
    cross: Float64[Tensor, "m k"],
    first: Float64[Tensor, " m"],
    second: Float64[Tensor, " k"],
    *,
    most_added: int,
) -> tuple[Float64[Tensor, "rows n"], Float64[Tensor, " n"]]:
    """Return what turns two bases into the eigenbasis of the mean of their matrices.

    With slices ``U_s`` and ``V_s`` of the two bases, ``[U_s, V_s] @ weights`` are the slices of the
    merged directions. The first span is kept whole: what the second basis adds is truncated, never
    what was there before.

    Args:
        cross: ``U^T V``.
        first: Eigenvalues of the first matrix ``U diag V^T``, >= 0.
        second: Eigenvalues of the second one, >= 0.
        most_added: Most directions beside the first span, >= 0.

    Returns:
        Weights ``[m + k, n]`` with ``m <= n <= m + most_added``, and eigenvalues, largest first.

    Source:
        The note to arXiv:2508.02079 asks that a refreshed basis keeps the first one in its span.
    """
    root = second.clamp_min(0).sqrt()
    # (I - P_U) V diag(second)^(1/2) through its Gram matrix; V has orthonormal columns.
    beside = torch.eye(len(second), dtype=cross.dtype) - cross.t() @ cross
    gram = root[:, None] * beside * root
    values, turn = torch.linalg.eigh((gram + gram.t()) / 2)
    values, turn = values.flip(0)[:most_added], turn.flip(1)[:, :most_added]
    largest = torch.cat([first, second]).max()
    kept = values > LEAST_SHARE * largest
    added = root[:, None] * turn[:, kept] * values[kept].rsqrt()
    span = torch.cat(
        [
            torch.cat([torch.eye(len(first), dtype=cross.dtype), -cross @ added], 1),
            torch.cat([torch.zeros(len(second), len(first), dtype=cross.dtype), added], 1),
        ]
    )
    seen = torch.cat([cross, added.t() @ beside])
    inner = (seen * second) @ seen.t()
    inner[: len(first), : len(first)] += torch.diag(first)
    found, rotation = torch.linalg.eigh((inner + inner.t()) / 4)
    weights = span @ rotation.flip(1)
    lead = weights.abs().argmax(0, keepdim=True)
    signs = torch.where(weights.gather(0, lead) < 0, -1.0, 1.0).to(weights)
    return weights * signs, found.flip(0).clamp_min(0)

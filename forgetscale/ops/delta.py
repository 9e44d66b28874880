"""How much each weight was changed by tuning."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

EPS = 1e-8


def relative_change(
    source: Float[Tensor, "*shape"], tuned: Float[Tensor, "*other"], eps: float = EPS
) -> Float[Tensor, "*shape"]:
    """Return ``|tuned - source| / (|source| + eps)`` per weight.

    Args:
        source: Weights before tuning, any float type.
        tuned: The same weights after tuning.
        eps: Added to the magnitude of the source weight, > 0. It decides the largest values: a
            weight of 0 that was moved at all counts as moved ``|d| / eps``.

    Returns:
        fp32 (fp64 where an input is fp64), >= 0.

    Raises:
        ValueError: The shapes differ or ``eps`` is not positive.

    Source:
        arXiv:2509.16596, section 5, with the ``eps`` of its official code. That code computes in
        bf16; here 16-bit weights are widened first.
    """
    if source.shape != tuned.shape:
        raise ValueError(
            f"source and tuned must have one shape, got {list(source.shape)} and"
            f" {list(tuned.shape)}"
        )
    if not eps > 0:
        raise ValueError(f"eps must be > 0, got {eps}")
    wide = torch.float64 if torch.float64 in (source.dtype, tuned.dtype) else torch.float32
    before, after = source.to(wide), tuned.to(wide)
    return (after - before).abs() / (before.abs() + eps)

"""AdaLoRA (arXiv:2303.10512): budget, importance of weights and triplets, orthogonality.

Formulas are those of PEFT 0.21 (``tuners/adalora``), which follow the paper's except where said.

Shape letters: S elements of a slice, R triplets, O out features, I in features.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def rank_budget(step: int, *, start: int, target: int, first: int, last: int) -> int:
    """Return how many triplets of all matrices together are kept at a step.

    Args:
        step: Optimizer step, 1 for the first.
        start: Triplets there are.
        target: Triplets kept at the end, <= ``start``.
        first: Up to this step all are kept.
        last: From this step on ``target`` are kept, > ``first``.

    Source:
        arXiv:2303.10512, equation 12, a cubic; rounded down as PEFT does.
    """
    if step <= first:
        return start
    if step >= last:
        return target
    left = 1.0 - (step - first) / (last - first)
    return int((start - target) * left**3 + target)


def update_importance_(
    sensitivity: Float[Tensor, " S"],
    uncertainty: Float[Tensor, " S"],
    param: Float[Tensor, " S"],
    grad: Float[Tensor, " S"],
    *,
    beta1: float,
    beta2: float,
) -> None:
    """Move the running means of ``|w g|`` and of its deviation, in place.

    Args:
        sensitivity: Running mean of ``|w g|``, equation 9.
        uncertainty: Running mean of ``| |w g| - sensitivity |``, equation 10.
        param: Weights after the step (PEFT; the paper takes those before it).
        grad: Gradients of the step.
        beta1: Decay of the first mean, in (0, 1).
        beta2: Decay of the second, in (0, 1).
    """
    now = (param * grad).abs()
    sensitivity.lerp_(now, 1.0 - beta1)
    uncertainty.lerp_((now - sensitivity).abs_(), 1.0 - beta2)


def triplet_parts(
    score: Float[Tensor, " S"], start: int, shape: tuple[int, int], *, by_row: bool
) -> Float[Tensor, " R"]:
    """Return this slice's part of each triplet's mean score, fp64; parts of all ranks add up.

    Args:
        score: Importance of the slice's elements.
        start: First element of the slice in the flattened factor.
        shape: Shape of the whole factor.
        by_row: Triplets are rows (``A``, ``E``) or columns (``B``).
    """
    height, width = shape
    place = torch.arange(start, start + score.numel(), device=score.device)
    triplet = place // width if by_row else place % width
    count, others = (height, width) if by_row else (width, height)
    parts = torch.zeros(count, dtype=torch.float64, device=score.device)
    return parts.index_add_(0, triplet, score.double()) / others


def keep_triplets(scores: Float[Tensor, "P R"], budget: int) -> Bool[Tensor, "P R"]:
    """Return which triplets are kept: those above the ``(all - budget)``-th smallest score.

    Scores equal to the threshold are dropped too, as in PEFT; with a budget of all, none is.

    Args:
        scores: Score of each triplet of each matrix.
        budget: How many are kept.
    """
    dropped = scores.numel() - budget
    if dropped <= 0:
        return torch.ones_like(scores, dtype=torch.bool)
    kept: Tensor = scores > torch.kthvalue(scores.flatten(), dropped).values
    return kept


def orthogonality_pull(
    factor: Float[Tensor, "H W"], *, by_row: bool
) -> tuple[Float[Tensor, ""], Float[Tensor, "H W"]]:
    """Return ``||G - I||`` of a factor and its gradient, ``G`` the Gram matrix of its triplets.

    Args:
        factor: ``A``, whose triplets are rows, or ``B``, whose triplets are columns.
        by_row: True for ``A``.

    Source:
        PEFT takes the norm, the paper (equation 4) its square.
    """
    rows = factor if by_row else factor.t()
    off = rows @ rows.t()
    off.diagonal().sub_(1.0)
    norm = torch.linalg.matrix_norm(off)
    # At an exactly orthogonal factor the norm has no gradient; 0 is one of its subgradients.
    pull = 2.0 * (off @ rows) / norm.clamp_min(torch.finfo(norm.dtype).tiny)
    return norm, pull if by_row else pull.t()

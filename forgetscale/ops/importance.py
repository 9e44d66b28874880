"""Column importance of weight matrices and the choice of frozen columns.

Shape letters: O out features, I in features, B blocks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from jaxtyping import Float, Int64
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Rule:
    """What a column score is made of: a power of a weight norm times one statistic."""

    statistic: str | None
    """Statistic of the source data the score multiplies by; None for magnitude rules."""
    norm: int | None
    """p of the column norm ``||W[:, j]||_p``; None where the weights do not matter."""
    exponent: int = 1
    """Power to which the norm is raised."""
    offset: float = 0.0
    """Added to the statistic."""


MATRIX_RULES: dict[str, Rule] = {
    "paper": Rule("l2_norm", 1),
    "mag_l1": Rule(None, 1),
    "official": Rule("mean_square", 2),
    "mag_l2": Rule(None, 2),
    "fisher": Rule("fisher", None),
    "sgpt_true": Rule("curvature", 2, exponent=2),
    "sgpt_official": Rule("recent_mean_square", None),
    "forgetscale": Rule("fisher", None),
}
"""How the columns of a matrix are scored, by name."""

VECTOR_RULES: dict[str, Rule] = MATRIX_RULES | {
    "official": Rule("mean_square", 2, offset=1.0),
    "sgpt_official": Rule("recent_mean_square", 2, offset=1.0),
    "forgetscale": Rule(None, 2),
}
"""How the elements of a 1-D tensor are scored: each is a column of one element. The published code
has one formula for them, ``|w_j| (1 + a_j)`` with the activation statistic of the score."""


def find_rule(rules: Mapping[str, Rule], name: str) -> Rule:
    """Return a rule by name.

    Args:
        rules: ``MATRIX_RULES`` or ``VECTOR_RULES``.
        name: Name of the score.

    Raises:
        ValueError: There is no such rule.
    """
    if name not in rules:
        raise ValueError(f"rule must be one of {', '.join(rules)}, got {name!r}")
    return rules[name]


def combine_scores(
    weight_norm: Float[Tensor, " I"], statistic: Float[Tensor, " I"] | None, rule: Rule
) -> Float[Tensor, " I"]:
    """Multiply column norms of the weight by the statistic, in fp64, rounded once to fp32.

    Args:
        weight_norm: ``||W[:, j]||_p`` with ``p = rule.norm``; any float type. Where the rule needs
            no norm only its length counts.
        statistic: The statistic named by ``rule.statistic``; not used by magnitude rules.
        rule: Score rule.

    Returns:
        Scores in fp32. The single rounding makes exact ties of equal columns survive sums that
        were added in another order (another number of ranks).

    Raises:
        ValueError: The statistic is missing or of another length, or a score is not finite.
    """
    score = torch.ones_like(weight_norm, dtype=torch.float64)
    if rule.norm is not None:
        score = weight_norm.double().pow(rule.exponent)
    if rule.statistic is not None:
        if statistic is None:
            raise ValueError(f"this rule needs the statistic {rule.statistic}")
        if statistic.shape != weight_norm.shape:
            raise ValueError(
                f"the statistic {rule.statistic} has shape {tuple(statistic.shape)}, expected"
                f" {tuple(weight_norm.shape)}: one value per input feature"
            )
        score = score * (rule.offset + statistic.double())
    if not bool(torch.isfinite(score).all()):
        raise ValueError("scores are not finite; check weights and calibration data")
    return score.float()


def column_scores(
    weight: Float[Tensor, "O I"], statistic: Float[Tensor, " I"] | None, rule: str
) -> Float[Tensor, " I"]:
    """Score every input column of a weight matrix: how much the source model relies on it.

    Args:
        weight: Weight of a linear layer, ``[out_features, in_features]``.
        statistic: One value per input feature over all calibration tokens ``t``, see below. Not
            used by ``mag_l1`` and ``mag_l2``; None will do.
        rule: ``paper``: ``||W[:, j]||_1 * ||X_j||_2`` with ``||X_j||_2 = sqrt(sum_t x_tj^2)``;
            ``official``: ``||W[:, j]||_2 * mean_t x_tj^2`` (no root); ``mag_l1``, ``mag_l2``: the
            weight norm alone; ``fisher``: the statistic ``sum_i F_ij`` alone; ``sgpt_true``:
            ``||W[:, j]||_2^2`` times ``conditional_curvature``; ``sgpt_official``: the mean square
            with weights from ``recent_block_weights`` alone; ``forgetscale``: as ``fisher``, but
            chosen by ``select_jointly``.

    Returns:
        Scores ``[in_features]`` in fp32. Only their order within one matrix has a meaning; any
        positive factor on the statistic leaves it unchanged.

    Raises:
        ValueError: Unknown rule, missing or misshapen statistic, non-finite result.

    Source:
        arXiv:2512.04844, Figure 1 (``paper``); gucci-j/ssu ``model_utils.py``,
        ``_freeze_structured_ssu_2d`` (``official``, ``fisher``, ``sgpt_official``), which computes
        in bf16: we use fp64 inside, so ties in its last bits are resolved differently.
        ``sgpt_true`` is SparseGPT (arXiv:2301.00774), saliency ``W_ij^2 / [chol(H^-1)]_jj^2``.
    """
    found = find_rule(MATRIX_RULES, rule)
    norm = torch.linalg.vector_norm(weight.double(), ord=found.norm or 2, dim=0)
    return combine_scores(norm, statistic, found)


def conditional_curvature(
    hessian: Float[Tensor, "I I"], damping: float = 0.01
) -> Float[Tensor, " I"]:
    """Return ``1 / [chol(H^-1)]_jj^2`` of a damped Hessian ``H = X^T X + damping mean(diag) 1``.

    This is the curvature of the output error in ``w_j`` when the features after ``j`` may make up
    for the change, as SparseGPT prunes from left to right. With ``H = R R^T`` and ``R`` upper
    triangular it equals ``R_jj^2``: one factorisation of the reversed matrix, no inverse.

    Args:
        hessian: ``X^T X`` of the inputs, fp64.
        damping: Share of the mean diagonal added to the diagonal, > 0.

    Returns:
        ``R_jj^2`` in fp64.

    Raises:
        ValueError: The matrix holds NaN or infinity, or is singular (all inputs are zero).

    Source:
        SparseGPT, arXiv:2301.00774, with the damping of its code (locuslab/wanda
        ``lib/sparsegpt.py``: Cholesky, inverse, upper Cholesky).
    """
    if not bool(torch.isfinite(hessian.sum())):
        raise ValueError("the Hessian of the inputs is not finite")
    backwards = hessian.flip(0, 1)
    backwards.diagonal().add_(damping * backwards.diagonal().mean())
    factor, info = torch.linalg.cholesky_ex(backwards)
    if int(info) != 0:
        raise ValueError("the Hessian of the inputs is singular")
    curvature: Tensor = factor.diagonal().square().flip(0)
    return curvature


def recent_block_weights(block: Int64[Tensor, " B"], num_blocks: int) -> Float[Tensor, " B"]:
    """Return each block's weight in the running average ``e <- (e + new) / 2``, in fp64.

    The published code averages so, in the order of blocks: the last block weighs 1/2. Written as
    weights, the average no longer depends on which rank sees a block or when.

    Args:
        block: Positions in the calibration order, ``0..num_blocks - 1``.
        num_blocks: Blocks of the whole calibration, > 0.

    Returns:
        ``2^-(num_blocks - k)`` for ``k >= 1`` and ``2^-(num_blocks - 1)`` for the first block;
        they sum to 1. Blocks more than 1,074 before the last weigh 0 in fp64.
    """
    return torch.exp2((block.clamp_min(1) - num_blocks).double())


def num_frozen(size: int, frozen_fraction: float) -> int:
    """Return ``floor(frozen_fraction * size)`` in exact arithmetic.

    The fraction is taken as the decimal number the user wrote: 0.29 of 100 is 29, where
    ``int(100 * 0.29)`` gives 28.

    Raises:
        ValueError: ``frozen_fraction`` is outside [0, 1].
    """
    if not 0.0 <= frozen_fraction <= 1.0:
        raise ValueError(f"frozen_fraction must lie in [0, 1], got {frozen_fraction}")
    return math.floor(Fraction(repr(float(frozen_fraction))) * size)


def select_frozen(scores: Float[Tensor, " I"], frozen_fraction: float) -> Int64[Tensor, " frozen"]:
    """Choose the columns to freeze: the highest scores, ties to the lower index.

    Args:
        scores: One score per column, any float type, finite.
        frozen_fraction: Share of columns, in [0, 1]; truncated to whole columns.

    Returns:
        Sorted indices of the frozen columns.

    Raises:
        ValueError: A score is NaN, or the fraction is outside [0, 1].

    Source:
        arXiv:2512.04844, per-matrix ranking; ties are ours (the reference leaves them to the
        backend's ``topk``).
    """
    if bool(torch.isnan(scores).any()):
        raise ValueError("scores contain NaN; check the calibration data and the weights")
    count = num_frozen(scores.numel(), frozen_fraction)
    order = torch.argsort(scores, descending=True, stable=True)
    return order[:count].sort().values


def select_jointly(
    scores: Sequence[Tensor], heights: Sequence[int], frozen_fraction: float
) -> list[Tensor]:
    """Choose columns of several matrices in one ranking by score per element.

    A column costs as many elements as its matrix is high. Columns are frozen from the highest score
    per element down, until the next one would exceed the share of elements; ties go to the earlier
    matrix, then to the lower index. So a matrix on which the source model relies much is frozen
    more than others, or whole, and one on which it relies little stays free.

    Args:
        scores: Per matrix one score a column, summed over its elements, comparable between matrices
            (``fisher`` is: all its values are squared gradients of the same loss).
        heights: Out features of each matrix.
        frozen_fraction: Share of the elements of all matrices, in [0, 1].

    Returns:
        Sorted indices of the frozen columns of each matrix.

    Raises:
        ValueError: A score is NaN, or the fraction is outside [0, 1].

    Source:
        Ours; evidence in ``launch/bench/rule_search.py``. arXiv:2512.04844 ranks in each matrix.
    """
    widths = [len(score) for score in scores]
    joint = torch.cat([s.double() / height for s, height in zip(scores, heights, strict=True)])
    if bool(torch.isnan(joint).any()):
        raise ValueError("scores contain NaN; check the calibration data and the weights")
    costs = torch.repeat_interleave(torch.tensor(heights), torch.tensor(widths))
    order = torch.argsort(joint, descending=True, stable=True)
    budget = num_frozen(int(costs.sum()), frozen_fraction)
    chosen = torch.zeros(joint.numel(), dtype=torch.bool)
    chosen[order[costs[order].cumsum(0) <= budget]] = True
    return [part.nonzero().flatten() for part in torch.split(chosen, widths)]

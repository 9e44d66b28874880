"""Column importance of weight matrices and the choice of frozen columns.

Shape letters: O out features, I in features.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

Rule = Literal["paper", "official", "mag_l1", "mag_l2"]
NORM_POWER: dict[str, int] = {"paper": 1, "mag_l1": 1, "official": 2, "mag_l2": 2}
"""Power p of the weight norm ``||W[:, j]||_p`` that each rule uses."""
INPUT_STATISTIC: dict[str, str] = {"paper": "l2_norm", "official": "mean_square"}
"""Which statistic of the inputs a rule multiplies by; magnitude rules use none."""


def combine_scores(
    weight_norm: Float[Tensor, " I"], input_norm: Float[Tensor, " I"] | None, rule: Rule
) -> Float[Tensor, " I"]:
    """Multiply column norms of the weight by the input statistic, in fp64, rounded once to fp32.

    Args:
        weight_norm: ``||W[:, j]||_p`` with ``p = NORM_POWER[rule]``; any float type.
        input_norm: Statistic named by ``INPUT_STATISTIC[rule]``; None for magnitude rules.
        rule: Score rule.

    Returns:
        Scores in fp32. The single rounding makes exact ties of equal columns survive sums that
        were added in another order (another number of ranks).

    Raises:
        ValueError: A statistic is missing, superfluous, of another length or not finite.
    """
    if rule not in NORM_POWER:
        raise ValueError(f"rule must be one of {', '.join(NORM_POWER)}, got {rule!r}")
    score = weight_norm.double()
    if rule in INPUT_STATISTIC:
        if input_norm is None:
            raise ValueError(f"rule {rule!r} needs input_norm ({INPUT_STATISTIC[rule]})")
        if input_norm.shape != weight_norm.shape:
            raise ValueError(
                f"input_norm has shape {tuple(input_norm.shape)}, expected"
                f" {tuple(weight_norm.shape)}: one value per input feature"
            )
        score = score * input_norm.double()
    if not bool(torch.isfinite(score).all()):
        raise ValueError(
            f"scores of rule {rule!r} are not finite; check weights and calibration data"
        )
    return score.float()


def column_scores(
    weight: Float[Tensor, "O I"], input_norm: Float[Tensor, " I"] | None, rule: Rule
) -> Float[Tensor, " I"]:
    """Score every input column of a weight matrix: how much the source model relies on it.

    Args:
        weight: Weight of a linear layer, ``[out_features, in_features]``.
        input_norm: One value per input feature over all calibration tokens ``t``. For ``paper``
            the norm ``||X_j||_2 = sqrt(sum_t x_tj^2)``; for ``official`` the mean square
            ``mean_t x_tj^2`` (no root). Not used by ``mag_l1`` and ``mag_l2``; None will do.
        rule: ``paper``: ``||W[:, j]||_1 * ||X_j||_2``; ``official``:
            ``||W[:, j]||_2 * mean(x_j^2)``; ``mag_l1`` and ``mag_l2``: the weight norm alone.

    Returns:
        Scores ``[in_features]`` in fp32. Only their order within one matrix has a meaning; any
        positive factor on ``input_norm`` leaves it unchanged.

    Raises:
        ValueError: Unknown rule, missing or misshapen ``input_norm``, non-finite result.

    Source:
        arXiv:2512.04844, Figure 1 (``paper``); gucci-j/ssu ``model_utils.py``,
        ``_freeze_structured_ssu_2d`` (``official``), which computes in bf16: we use fp64 inside,
        so ties in its last bits are resolved differently.
    """
    if rule not in NORM_POWER:
        raise ValueError(f"rule must be one of {', '.join(NORM_POWER)}, got {rule!r}")
    norm = torch.linalg.vector_norm(weight.double(), ord=NORM_POWER[rule], dim=0)
    return combine_scores(norm, input_norm, rule)


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

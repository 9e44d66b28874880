"""Collision terms of AlignGuard on an adapter: values and gradients of the factors, by rows.

``dW = s B A`` is split by a one-sided projector into ``a = P dW`` and ``t = dW - a``; the terms are
``alpha E_RM(a, t) + (1 - alpha) E_geo(a, t)`` of ``forgetscale.ops.penalties``. In the Euclidean
product ``E_geo`` is zero with its gradient, so it counts only with a metric.

Shape letters: O out features, I in features, r adapter rank, m retained directions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from forgetscale.ops.factors import ROWS_AT_A_TIME, FactorPull
from forgetscale.ops.penalties import geodesic_pulls, overlap_weight, riemannian_pulls

TINY_SQUARE = 1e-16


@dataclass(frozen=True, slots=True)
class Collision:
    """What is penalised about two parts of a change."""

    alpha: float = 0.5
    """Share of the Riemannian term, in [0, 1]; the rest is the geodesic one."""
    beta: float = 5.0
    """See ``overlap_weight``."""
    tau: float = 0.01
    """See ``overlap_weight``."""
    temperature: float = 1.0
    """See ``overlap_weight``."""


@dataclass(frozen=True, slots=True)
class _Split:
    """Rows of ``dW`` and of its alignment part ``U U^T dW``."""

    basis: Tensor
    lora_a: Tensor
    lora_b: Tensor
    scale: float

    def blocks(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield rows, ``a`` and ``t`` of them."""
        seen = self.scale * (self.basis.t() @ self.lora_b @ self.lora_a)
        height = self.lora_b.shape[0]
        for first in range(0, height, ROWS_AT_A_TIME):
            rows = slice(first, min(first + ROWS_AT_A_TIME, height))
            delta = self.scale * (self.lora_b[rows] @ self.lora_a)
            part = self.basis[rows] @ seen
            yield rows, part, delta - part


def _inner_products(split: _Split, metric: Callable[[slice], Tensor]) -> tuple[float, float, float]:
    sums = torch.zeros(3, dtype=torch.float64, device=split.lora_a.device)
    for rows, a, t in split.blocks():
        weight = metric(rows)
        terms = ((weight * a * t).sum(), (weight * a * a).sum(), (weight * t * t).sum())
        sums += torch.stack(terms).double()
    inner, first, second = sums.tolist()
    return inner, first, second


def _left_collision(
    split: _Split, options: Collision, metric: Callable[[slice], Tensor] | None
) -> FactorPull:
    numel = split.lora_b.shape[0] * split.lora_a.shape[1]
    share = options.alpha / numel
    value = split.lora_a.new_zeros(())
    geo: tuple[float, float, float] | None = None
    if metric is not None and options.alpha < 1:
        inner, first, second = _inner_products(split, metric)
        if min(first, second) > TINY_SQUARE:
            geo = geodesic_pulls(inner, first, second)
            value = value + (1 - options.alpha) * inner**2 / (first * second + 1e-12)
    grad_a, grad_b = torch.zeros_like(split.lora_a), torch.zeros_like(split.lora_b)
    pulled = torch.zeros(split.basis.shape[1], split.lora_a.shape[1]).to(split.lora_a)
    for rows, a, t in split.blocks():
        eta = overlap_weight(
            a + t, beta=options.beta, tau=options.tau, temperature=options.temperature
        )
        value = value + share * (eta * (a * t).abs()).sum()
        by_task, by_alignment, by_weight = riemannian_pulls(
            a,
            t,
            beta=options.beta,
            tau=options.tau,
            reduction="sum",
            temperature=options.temperature,
        )
        inside, outside = share * (by_task - by_alignment), share * (by_alignment + by_weight)
        if geo is not None and metric is not None:
            p, q, r = geo
            weight = (1 - options.alpha) * metric(rows)
            of_a, of_t = weight * (p * t + 2 * q * a), weight * (p * a + 2 * r * t)
            inside, outside = inside + of_a - of_t, outside + of_t
        pulled += split.basis[rows].t() @ inside
        grad_b[rows] = split.scale * (outside @ split.lora_a.t())
        grad_a += split.scale * (split.lora_b[rows].t() @ outside)
    grad_b += split.scale * (split.basis @ (pulled @ split.lora_a.t()))
    grad_a += split.scale * ((split.lora_b.t() @ split.basis) @ pulled)
    return FactorPull(value, grad_a, grad_b)


def collision_pull(
    side: Literal["left", "right"],
    basis: Float[Tensor, "d m"],
    lora_a: Float[Tensor, "r I"],
    lora_b: Float[Tensor, "O r"],
    scale: float,
    options: Collision,
    metric: Callable[[slice], Tensor] | None = None,
) -> FactorPull:
    """Return ``alpha E_RM + (1 - alpha) E_geo``, means over elements, and its gradients.

    Args:
        side: Whether the projector acts on outputs or inputs.
        basis: Its orthonormal directions.
        lora_a: ``A``.
        lora_b: ``B``.
        scale: ``s``.
        options: Shape of the terms.
        metric: Rows (of outputs for ``left``, of inputs for ``right``) -> a diagonal metric
            there; None leaves the geodesic term, which is zero then, out.
    """
    if side == "left":
        return _left_collision(_Split(basis, lora_a, lora_b, scale), options, metric)
    # Rows of dW^T = s A^T B^T: the sides change places.
    split = _Split(basis, lora_b.t(), lora_a.t(), scale)
    found = _left_collision(split, options, metric)
    return FactorPull(found.value, found.lora_b.t(), found.lora_a.t())

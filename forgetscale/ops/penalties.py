"""Penalties on a weight change: values, and gradients in closed form.

A change ``dW`` is compared with what a Fisher basis says of the source model. Values can be
differentiated; gradients are also given without autograd, because under ZeRO-3 weights gathered for
a loss are gone before backward. For the factors of an adapter see ``forgetscale.ops.factors``.

Shape letters: D weights in row-major order, m retained directions.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Reduction = Literal["sum", "mean"]
TINY_NORM = 1e-8
"""A change shorter than this has no direction, so no cosine is taken."""


def _flat(delta: Tensor, like: Tensor) -> Tensor:
    return delta.reshape(-1).to(torch.promote_types(delta.dtype, like.dtype))


def basis_coefficients(
    delta: Float[Tensor, "*shape"], basis: Float[Tensor, "D m"]
) -> Float[Tensor, " m"]:
    """Return ``c = U^T x`` of a change.

    Args:
        delta: The change, in the weight's shape or flattened, or a slice of it.
        basis: Columns ``U``, as many rows as the change has elements.

    Raises:
        ValueError: The sizes differ.
    """
    if delta.numel() != basis.shape[0]:
        raise ValueError(
            f"the basis is for {basis.shape[0]} weights, the change has {delta.numel()}; the basis"
            " belongs to another weight or to another slice of it"
        )
    flat = _flat(delta, basis)
    return basis.to(flat.dtype).t() @ flat


def alignment_penalty(
    delta: Float[Tensor, "*shape"],
    basis: Float[Tensor, "D m"],
    eigenvalues: Float[Tensor, " m"],
) -> Float[Tensor, ""]:
    """Return ``sum_i lam_i <U_i, x>^2``, the Fisher norm of the part of a change the basis spans.

    Args:
        delta: The change ``dW``, in the weight's shape or flattened row-major.
        basis: Orthonormal columns ``U``.
        eigenvalues: ``lam``, >= 0.

    Raises:
        ValueError: Basis and change have different sizes.

    Source:
        arXiv:2508.02079, ``||F^(1/2) dW_A||_F^2``, which is defined on ``vec(dW)`` only.
    """
    found = basis_coefficients(delta, basis)
    return (eigenvalues.to(found.dtype) * found.square()).sum()


def alignment_gradient(
    delta: Float[Tensor, "*shape"],
    basis: Float[Tensor, "D m"],
    eigenvalues: Float[Tensor, " m"],
) -> Float[Tensor, "*shape"]:
    """Return the gradient of ``alignment_penalty``, ``2 U (lam * U^T x)``.

    Args:
        delta: The change.
        basis: Orthonormal columns ``U``.
        eigenvalues: ``lam``, >= 0.
    """
    found = basis_coefficients(delta, basis)
    pulled = 2 * eigenvalues.to(found.dtype) * found
    return (basis.to(found.dtype) @ pulled).view(delta.shape)


def _require_reduction(reduction: str) -> None:
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction must be sum or mean, got {reduction!r}")


def overlap_weight(
    reference: Float[Tensor, "*shape"],
    *,
    beta: float | int,
    tau: float | int,
    temperature: float = 1.0,
) -> Float[Tensor, "*shape"]:
    """Return ``eta = 1 + beta * sigmoid((|w| - tau) / temperature)``.

    Args:
        reference: ``w``, the change or the changed weight.
        beta: Largest addition to 1, >= 0.
        tau: Middle of the rise, in units of a weight.
        temperature: Width of the rise, in units of a weight, > 0. The published 1 makes ``eta``
            nearly constant (3.49 to 3.61 for ``|w|`` in 0 to 0.1 at beta 5); a quarter of ``tau``
            spans most of its range.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    return 1 + beta * torch.sigmoid((reference.abs() - tau) / temperature)


def riemannian_overlap(
    delta_a: Float[Tensor, "*shape"],
    delta_t: Float[Tensor, "*shape"],
    *,
    beta: float | int,
    tau: float | int,
    reduction: Reduction,
    temperature: float = 1.0,
    weight: Float[Tensor, "*shape"] | None = None,
) -> Float[Tensor, ""]:
    """Return the sum or mean of ``eta |dW_A dW_T|`` over elements.

    Args:
        delta_a: Alignment part of a change.
        delta_t: Task part.
        beta: See ``overlap_weight``.
        tau: See ``overlap_weight``.
        reduction: ``mean`` does not depend on the size of a matrix; ``sum`` differs from it by
            ``O * I``.
        temperature: See ``overlap_weight``.
        weight: Source weight ``W0``; given, ``eta`` looks at ``|W0 + dW|`` instead of ``|dW|``.

    Raises:
        ValueError: Shapes differ, or ``reduction`` is neither of the two.

    Source:
        arXiv:2508.02079 as two readers of its appendix agree; one of them has no absolute value,
        and the term is then unbounded below.
    """
    _require_reduction(reduction)
    if delta_a.shape != delta_t.shape:
        raise ValueError(f"shapes differ: {list(delta_a.shape)} and {list(delta_t.shape)}")
    whole = delta_a + delta_t
    reference = whole if weight is None else weight + whole
    found = overlap_weight(reference, beta=beta, tau=tau, temperature=temperature)
    found = found * (delta_a * delta_t).abs()
    return found.sum() if reduction == "sum" else found.mean()


def riemannian_pulls(
    delta_a: Float[Tensor, "*shape"],
    delta_t: Float[Tensor, "*shape"],
    *,
    beta: float | int,
    tau: float | int,
    reduction: Reduction,
    temperature: float = 1.0,
    weight: Float[Tensor, "*shape"] | None = None,
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """Return the three parts of the gradient of ``riemannian_overlap``.

    With ``dW_A = P x`` and ``dW_T = x - P x`` the gradient in ``x`` is
    ``P(by_task) + (by_alignment - P by_alignment) + by_weight``: one more projection, which the
    caller does, since only it knows how ``P`` is spread over ranks.

    Args:
        delta_a: Alignment part of a change, ``a``.
        delta_t: Task part, ``t``.
        beta: See ``overlap_weight``.
        tau: See ``overlap_weight``.
        reduction: See ``riemannian_overlap``; for slices of a matrix take ``sum`` and divide.
        temperature: See ``overlap_weight``.
        weight: See ``riemannian_overlap``.

    Returns:
        ``eta q t``, ``eta q a`` and the change of ``eta`` itself, with ``q = sign(a t)``.
    """
    _require_reduction(reduction)
    whole = delta_a + delta_t
    reference = whole if weight is None else weight + whole
    rise = torch.sigmoid((reference.abs() - tau) / temperature)
    eta = 1 + beta * rise
    product = delta_a * delta_t
    sign = product.sign()
    slope = beta / temperature * rise * (1 - rise) * reference.sign() * product.abs()
    scale = 1.0 if reduction == "sum" else 1.0 / whole.numel()
    return scale * eta * sign * delta_t, scale * eta * sign * delta_a, scale * slope


def _inner(first: Tensor, second: Tensor, metric: Tensor | None) -> Tensor:
    if metric is None:
        return first @ second
    if metric.numel() == first.numel():
        return (metric.reshape(-1).to(first.dtype) * first) @ second
    return first @ (metric.to(first.dtype) @ second)


def _require_metric(metric: Tensor | None, size: int) -> None:
    if metric is not None and metric.numel() not in (size, size * size):
        raise ValueError(
            f"metric must hold {size} numbers (a diagonal) or {size} x {size}, got"
            f" {list(metric.shape)}"
        )


def geodesic_overlap(
    delta_a: Float[Tensor, "*shape"],
    delta_t: Float[Tensor, "*shape"],
    metric: Tensor | None = None,
    *,
    eps: float = 1e-12,
) -> Float[Tensor, ""]:
    """Return the squared cosine ``<A, T>^2 / (<A, A> <T, T> + eps)`` of two changes.

    With ``A = P x``, ``T = x - P x`` and an orthogonal projector ``P`` this is zero for every
    ``x``, and so is its gradient, unless ``metric`` does not commute with ``P``. As a loss it is
    therefore for a metric, or for two adapters trained apart.

    Args:
        delta_a: One change.
        delta_t: The other.
        metric: Positive semi-definite: a diagonal in the shape of the changes, or ``[D, D]``; None
            is the Euclidean product.
        eps: Added to the product of the squared norms, > 0.

    Returns:
        A number in [0, 1]; 0 if either change is shorter than ``TINY_NORM``.

    Raises:
        ValueError: Sizes differ.

    Source:
        arXiv:2508.02079 as two readers of its appendix agree.
    """
    if delta_a.shape != delta_t.shape:
        raise ValueError(f"shapes differ: {list(delta_a.shape)} and {list(delta_t.shape)}")
    first, second = delta_a.reshape(-1), delta_t.reshape(-1)
    _require_metric(metric, first.numel())
    if min(float(first.detach().norm()), float(second.detach().norm())) < TINY_NORM:
        return (first * second).sum() * 0.0
    both = _inner(first, second, metric)
    return both.square() / (_inner(first, first, metric) * _inner(second, second, metric) + eps)


def geodesic_pulls(
    inner: float, first: float, second: float, *, eps: float = 1e-12
) -> tuple[float, float, float]:
    """Return the derivatives of ``geodesic_overlap`` in its three inner products.

    With a metric ``M`` the gradient in ``A`` is ``p M T + 2 q M A`` and in ``T`` it is
    ``p M A + 2 r M T``, for the returned ``(p, q, r)``.

    Args:
        inner: ``<A, T>``.
        first: ``<A, A>``.
        second: ``<T, T>``.
        eps: As in ``geodesic_overlap``.
    """
    below = first * second + eps
    share = inner * inner / (below * below)
    return 2 * inner / below, -share * second, -share * first

"""Low-rank Fisher information: eigenvectors from few gradients, their number, their contrast.

``F = (1/N) sum_n g_n g_n^T`` over N gradients of D weights has at most N directions, so they come
from the ``N x N`` Gram matrix of the gradients and never from a ``D x D`` one. The Gram matrix is a
sum over slices of the gradients: ranks that hold slices add ``N x N`` numbers, and each makes its
own rows of the eigenvectors.

Shape letters: N gradients, M other gradients, D weights, m retained directions, O out features,
I in features.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Float64
from torch import Tensor

RELATIVE_ZERO = 1e-10
"""An eigenvalue below this share of the largest is rounding of a Gram matrix in fp64."""


def require_rank(m: int, num_samples: int) -> None:
    """Refuse more directions than gradients can span.

    Raises:
        ValueError: ``m`` is outside 1..num_samples.
    """
    if not 1 <= m <= num_samples:
        raise ValueError(
            f"m must lie in 1..{num_samples}, the number of gradients (a Fisher matrix of"
            f" {num_samples} samples has no more directions), got {m}; take more samples or a"
            " smaller m"
        )


def gram_matrix(grads: Float[Tensor, "N D"]) -> Float64[Tensor, "N N"]:
    """Return the inner products of gradients, or of slices of them (add those of all ranks).

    Args:
        grads: One gradient a row, any float type.
    """
    found = torch.zeros(grads.shape[0], grads.shape[0], dtype=torch.float64, device=grads.device)
    for start in range(0, grads.shape[1], 2**20):
        part = grads[:, start : start + 2**20].double()
        found += part @ part.t()
    return found


def gram_eigenbasis(
    gram: Float64[Tensor, "N N"], m: int
) -> tuple[Float64[Tensor, "N m"], Float64[Tensor, " m"]]:
    """Return what turns gradients into eigenvectors of their Fisher matrix.

    With slices ``G_s`` of the gradients, ``U_s = G_s^T @ weights`` are the slices of the
    orthonormal eigenvectors.

    Args:
        gram: ``G G^T`` of the whole gradients.
        m: Directions, in 1..N.

    Returns:
        Weights, and eigenvalues of ``G^T G / N`` from the largest on. Where the gradients span
        fewer than ``m`` directions the last ones are zero, vector and eigenvalue.

    Raises:
        ValueError: ``m`` is outside 1..N.
    """
    num_samples = gram.shape[0]
    require_rank(m, num_samples)
    values, vectors = torch.linalg.eigh((gram + gram.t()) / (2 * num_samples))
    values, vectors = values.flip(0)[:m], vectors.flip(1)[:, :m]
    real = values > RELATIVE_ZERO * values[0]
    scale = torch.where(real, (num_samples * values.clamp_min(1e-300)).rsqrt(), 0.0)
    # A sign of their own, so that another number of ranks or another LAPACK gives the same ones.
    largest = vectors.abs().argmax(0, keepdim=True)
    vectors = vectors * torch.where(vectors.gather(0, largest) < 0, -1.0, 1.0)
    return vectors * scale, torch.where(real, values, 0.0)


def low_rank_basis(
    grads: Float[Tensor, "N ..."], m: int
) -> tuple[Float[Tensor, "D m"], Float[Tensor, " m"]]:
    """Return the leading eigenvectors and eigenvalues of ``F = (1/N) sum_n g_n g_n^T``.

    Args:
        grads: One gradient of the summed log-likelihood per sample (or per batch of samples with
            labels drawn from the model), in the weights' shape or flattened.
        m: Directions, in 1..N.

    Returns:
        ``U [D, m]`` with orthonormal columns in the row-major order of the weights, and the
        eigenvalues ``[m]``, largest first, in the type of ``grads`` (maths in fp64). Columns
        beyond the rank of the gradients are zero.

    Raises:
        ValueError: ``m`` is outside 1..N, or larger than D.

    Source:
        arXiv:2508.02079 takes the top eigenvectors of the Fisher matrix and does not say how; this
        is the Gram route.
    """
    flat = grads.flatten(1)
    if m > flat.shape[1]:
        raise ValueError(f"m must not exceed the {flat.shape[1]} weights, got {m}")
    weights, values = gram_eigenbasis(gram_matrix(flat), m)
    basis = flat.double().t() @ weights
    return basis.to(grads.dtype), values.to(grads.dtype)


def explained_rank(
    eigenvalues: Float[Tensor, " k"], trace: float, *, explained: float, cap: int
) -> int:
    """Return the smallest number of directions that explains a share of the trace.

    Args:
        eigenvalues: Largest first.
        trace: Trace of the whole matrix, >= their sum.
        explained: Share of the trace, in (0, 1].
        cap: Largest number, > 0.

    Returns:
        At least 1, at most ``cap`` and the number of eigenvalues above zero (1 if there is none).

    Raises:
        ValueError: ``explained`` or ``cap`` is out of range.
    """
    if not 0 < explained <= 1:
        raise ValueError(f"explained must lie in (0, 1], got {explained}")
    if cap < 1:
        raise ValueError(f"cap must be > 0, got {cap}")
    values = eigenvalues.double()
    real = int((values > 0).sum())
    # The last bit of a sum must not ask for one direction more.
    enough = values.cumsum(0) >= explained * trace * (1 - 1e-12)
    first = int(enough.nonzero()[0]) + 1 if bool(enough.any()) else values.numel()
    return max(1, min(first, cap, real))


def contrast_weights(
    gram: Float64[Tensor, "N N"],
    cross: Float64[Tensor, "M N"],
    m: int,
    *,
    damping: float = 0.01,
) -> tuple[Float64[Tensor, "N m"], Float64[Tensor, " m"], Float64[Tensor, " m"]]:
    """Return directions that matter to one data set much more than to another.

    Among the directions the first set's gradients ``A`` span, those with the largest ratio
    ``u^T F_a u / u^T (F_b + eps I) u`` are kept, made orthonormal, and rotated so that ``F_a`` is
    diagonal in them. Directions every text needs, such as those of common words, have a low ratio.

    Args:
        gram: ``A A^T``.
        cross: ``B A^T`` with the gradients of the other data.
        m: Directions, in 1..N.
        damping: ``eps`` as a share of the mean of ``F_b`` over the span, > 0; without it a
            direction the other data never touch would have an infinite ratio.

    Returns:
        Weights as in ``gram_eigenbasis``, the eigenvalues of ``F_a`` inside the kept span, and the
        kept ratios, largest first.

    Raises:
        ValueError: ``m`` is outside 1..N, or ``damping`` is not positive.
    """
    if damping <= 0:
        raise ValueError(f"damping must be > 0, got {damping}")
    require_rank(m, gram.shape[0])
    span, values = gram_eigenbasis(gram, gram.shape[0])
    kept = values > 0
    if not bool(kept.any()):
        return span[:, :m], values[:m], torch.zeros_like(values[:m])
    span, values = span[:, kept], values[kept]
    inside = cross @ span
    other = inside.t() @ inside / cross.shape[0]
    directions, found, ratios = _contrast(torch.diag(values), other, m, damping)
    missing = m - directions.shape[1]
    pad = torch.nn.functional.pad
    weights = pad(span @ directions, (0, missing))
    return weights, pad(found, (0, missing)), pad(ratios, (0, missing))


def _contrast(
    align: Tensor, other: Tensor, m: int, damping: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return orthonormal directions of the largest ratios, values of ``align``, ratios."""
    tiny = float(align.diagonal().mean()) * RELATIVE_ZERO
    mean = other.diagonal().mean().clamp_min(tiny)
    eye = torch.eye(len(align), dtype=align.dtype, device=align.device)
    root = torch.linalg.cholesky(other + damping * mean * eye)
    # Whitened by the other set: ordinary eigenvectors there are the generalised ones here.
    whitened = torch.linalg.solve_triangular(root, align, upper=False)
    whitened = torch.linalg.solve_triangular(root, whitened.t(), upper=False)
    ratios, vectors = torch.linalg.eigh((whitened + whitened.t()) / 2)
    ratios, vectors = ratios.flip(0)[:m], vectors.flip(1)[:, :m]
    directions = torch.linalg.solve_triangular(root.t(), vectors, upper=True)
    orthonormal, _ = torch.linalg.qr(directions)
    inner = orthonormal.t() @ align @ orthonormal
    found, turn = torch.linalg.eigh((inner + inner.t()) / 2)
    return orthonormal @ turn.flip(1), found.flip(0).clamp_min(0), ratios


def contrast_side_basis(
    second_moment: Float[Tensor, "d d"],
    other: Float[Tensor, "d d"],
    m: int,
    *,
    damping: float = 0.01,
) -> tuple[Float[Tensor, "d m"], Float[Tensor, " m"], Float[Tensor, " m"]]:
    """Return directions of one Kronecker factor that other data do not need.

    Args:
        second_moment: Factor on the data that matter.
        other: The same factor on general data.
        m: Directions, in 1..d.
        damping: As in ``contrast_weights``.

    Returns:
        Orthonormal directions, the values of ``second_moment`` in them, the ratios.

    Raises:
        ValueError: ``m`` is outside 1..d, or ``damping`` is not positive.
    """
    if damping <= 0:
        raise ValueError(f"damping must be > 0, got {damping}")
    if not 1 <= m <= second_moment.shape[0]:
        raise ValueError(
            f"m must lie in 1..{second_moment.shape[0]}, the width of this side, got {m}"
        )
    return _contrast(second_moment, other, m, damping)


def side_basis(
    second_moment: Float[Tensor, "d d"], m: int
) -> tuple[Float[Tensor, "d m"], Float[Tensor, " m"]]:
    """Return leading eigenvectors and eigenvalues of one Kronecker factor.

    Args:
        second_moment: ``E[delta delta^T]`` of output gradients or ``E[a a^T]`` of inputs.
        m: Directions, in 1..d.

    Raises:
        ValueError: ``m`` is outside 1..d.
    """
    size = second_moment.shape[0]
    if not 1 <= m <= size:
        raise ValueError(f"m must lie in 1..{size}, the width of this side, got {m}")
    values, vectors = torch.linalg.eigh((second_moment + second_moment.t()) / 2)
    values, vectors = values.flip(0)[:m].clamp_min(0), vectors.flip(1)[:, :m]
    largest = vectors.abs().argmax(0, keepdim=True)
    return vectors * torch.where(vectors.gather(0, largest) < 0, -1.0, 1.0), values


def principal_cosines(
    first: Float[Tensor, "D m"], second: Float[Tensor, "D k"]
) -> Float[Tensor, " n"]:
    """Return the cosines of the principal angles between two spans, largest first.

    Args:
        first: Orthonormal columns.
        second: Orthonormal columns.
    """
    cosines: Tensor = torch.linalg.svdvals(first.t() @ second)
    return cosines.clamp_max(1.0)

"""Formulas of methods next to AlignGuard: which part of a change they keep, and what they penalise.

``published`` and ``exact`` stand side by side where code and intention differ. Some protect by
staying inside a direction the alignment moved along (SafeLoRA, AsFT), the others by staying outside
directions that matter.

Shape letters: O out features, I in features, r adapter rank, k kept directions.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from forgetscale.ops.factors import FactorPull

Form = Literal["published", "exact"]
RELATIVE_ZERO = 1e-10


class LeftMatrix(NamedTuple):
    """A symmetric matrix on the output side as ``basis diag(values) basis^T``."""

    basis: Tensor
    """``[O, k]``, orthonormal columns."""
    values: Tensor
    """``[k]``; all 1 for a projector."""

    def apply(self, delta: Float[Tensor, "O I"]) -> Float[Tensor, "O I"]:
        """Return ``C dW``."""
        return self.basis @ (self.values[:, None] * (self.basis.t() @ delta))

    def dense(self) -> Float[Tensor, "O O"]:
        """Return the matrix itself."""
        return (self.basis * self.values) @ self.basis.t()


def alignment_matrix(difference: Float[Tensor, "O I"], form: Form = "exact") -> LeftMatrix:
    """Return the matrix SafeLoRA and AsFT multiply with on the output side.

    Args:
        difference: ``V = W_aligned - W_base``.
        form: ``published`` is ``V V^T / ||V||_F``, which is no projector: it is not idempotent, and
            its scale grows with ``V``. ``exact`` is ``V (V^T V)^+ V^T``, the projector onto the
            columns of ``V``.

    Source:
        arXiv:2405.16833 and its code (``model.py``).
    """
    left, singular, _ = torch.linalg.svd(difference, full_matrices=False)
    kept = singular > RELATIVE_ZERO * singular[0]
    left, singular = left[:, kept], singular[kept]
    if form == "exact":
        return LeftMatrix(left, torch.ones_like(singular))
    return LeftMatrix(left, singular.square() / singular.norm())


def matrix_cosine(first: Float[Tensor, "O I"], second: Float[Tensor, "O I"]) -> Float[Tensor, ""]:
    """Return the cosine between two matrices in the Frobenius product; 0 if one is zero."""
    norms = first.norm() * second.norm()
    return torch.where(norms > 0, (first * second).sum() / norms, torch.zeros_like(norms))


def safelora_factor(
    lora_a: Float[Tensor, "r I"],
    lora_b: Float[Tensor, "O r"],
    matrix: LeftMatrix,
    threshold: float,
) -> tuple[Float[Tensor, "O r"], Float[Tensor, ""]]:
    """Replace ``B`` by ``C B`` where the projected change points elsewhere than the change.

    Args:
        lora_a: ``A``.
        lora_b: ``B``.
        matrix: From ``alignment_matrix``.
        threshold: Projected where the cosine is at most this, in [-1, 1].

    Returns:
        The new ``B`` (the same tensor where nothing is done), and the cosine.

    Source:
        arXiv:2405.16833. The published default picks the threshold so that ten layers fall under
        it: the tenth smallest cosine.
    """
    delta = lora_b @ lora_a
    projected = matrix.apply(lora_b)
    cosine = matrix_cosine(projected @ lora_a, delta)
    return (projected if float(cosine) <= threshold else lora_b), cosine


def asft_pull(
    matrix: LeftMatrix,
    lora_a: Float[Tensor, "r I"],
    lora_b: Float[Tensor, "O r"],
    scale: float = 1.0,
) -> FactorPull:
    """Return ``||(I - C) s B A||_F^2`` and its gradients, without forming the change.

    Args:
        matrix: ``C`` from ``alignment_matrix``.
        lora_a: ``A``.
        lora_b: ``B``.
        scale: ``s``; the published code leaves it out, which is 1.

    Source:
        AsFT and its code (``AsFT_train_utils.py``), which uses the published ``C``.
    """
    outside = lora_b - matrix.apply(lora_b)
    again = outside - matrix.apply(outside)
    inside, square = lora_a @ lora_a.t(), scale * scale
    return FactorPull(
        square * (inside * (outside.t() @ outside)).sum(),
        2 * square * (outside.t() @ outside) @ lora_a,
        2 * square * again @ inside,
    )


def olora_pull(
    current: Float[Tensor, "r I"],
    previous: Float[Tensor, "k I"],
    form: Form = "published",
) -> tuple[Float[Tensor, ""], Float[Tensor, "r I"]]:
    """Return the overlap of an adapter's ``A`` with those of earlier tasks, and its gradient.

    Args:
        current: ``A`` of the task being learnt.
        previous: Rows of all earlier ``A``.
        form: ``published`` sums absolute entries of ``A_i A_t^T`` (the code), ``exact`` their
            squares (the paper).

    Source:
        arXiv:2310.14152 and its code (``uie_trainer_lora.py``).
    """
    product = previous @ current.t()
    if form == "published":
        return product.abs().sum(), product.sign().t() @ previous
    return product.square().sum(), 2 * product.t() @ previous


def clora_pull(
    factor: Float[Tensor, "d r"], basis: Float[Tensor, "d k"]
) -> tuple[Float[Tensor, ""], Float[Tensor, "d r"]]:
    """Return ``||factor^T P||_F^2`` and its gradient: one side of CLoRA's regularisation.

    Args:
        factor: ``A^T`` or ``B``.
        basis: ``P``, fixed random orthonormal columns.

    Source:
        arXiv:2410.16801; the norm as it is written there could not be checked.
    """
    seen = basis.t() @ factor
    return seen.square().sum(), 2 * basis @ seen


def random_basis(size: int, k: int, generator: torch.Generator) -> Float[Tensor, "d k"]:
    """Return fixed random orthonormal columns in fp64.

    Args:
        size: Rows.
        k: Columns, in 1..size.
        generator: Source of randomness.
    """
    if not 1 <= k <= size:
        raise ValueError(f"k must lie in 1..{size}, got {k}")
    drawn = torch.randn(size, k, generator=generator, dtype=torch.float64)
    basis: Tensor = torch.linalg.qr(drawn)[0]
    return basis


def top_directions(
    weight: Float[Tensor, "O I"], k: int
) -> tuple[Float[Tensor, "O k"], Float[Tensor, "I k"]]:
    """Return the leading left and right singular vectors of a weight (OPLoRA, OSF).

    Args:
        weight: ``W0``.
        k: How many, in 1..min(O, I).
    """
    if not 1 <= k <= min(weight.shape):
        raise ValueError(f"k must lie in 1..{min(weight.shape)}, got {k}")
    left, _, right = torch.linalg.svd(weight, full_matrices=False)
    return left[:, :k], right[:k].t()


def oplora_factors(
    lora_a: Float[Tensor, "r I"],
    lora_b: Float[Tensor, "O r"],
    left: Float[Tensor, "O k"],
    right: Float[Tensor, "I k"],
) -> tuple[Float[Tensor, "r I"], Float[Tensor, "O r"]]:
    """Return the factors of ``(I - U U^T) B A (I - V V^T)``.

    Args:
        lora_a: ``A``.
        lora_b: ``B``.
        left: ``U``, leading left singular vectors of the source weight.
        right: ``V``, leading right ones.

    Source:
        arXiv:2510.13003: the leading singular triples of the source weight stay exactly.
    """
    return lora_a - (lora_a @ right) @ right.t(), lora_b - left @ (left.t() @ lora_b)


def salora_basis(
    weight: Float[Tensor, "O I"], inputs: Float[Tensor, "I n"], k: int
) -> Float[Tensor, "O k"]:
    """Return the leading left singular vectors of ``W0 X``: outputs on harmful inputs (SaLoRA).

    The change is then ``(I - U U^T) B A``.

    Args:
        weight: ``W0``.
        inputs: Inputs of the layer on safety data, one a column.
        k: How many, in 1..min(O, n).

    Source:
        arXiv:2501.01765; the formula as digests tell it.
    """
    return top_directions(weight @ inputs, k)[0]


def response_basis(
    weight: Float[Tensor, "O I"], second_moment: Float[Tensor, "I I"], k: int
) -> tuple[Float[Tensor, "O k"], Float[Tensor, " k"]]:
    """Return what ``salora_basis`` does, from the inputs' second moment instead of the inputs.

    Args:
        weight: ``W0``.
        second_moment: ``X X^T`` or its mean over inputs.
        k: How many, in 1..O.

    Returns:
        Leading eigenvectors of ``W0 X X^T W0^T``, each with the sign that makes its largest entry
        positive, and their eigenvalues.

    Raises:
        ValueError: ``k`` is outside 1..O.
    """
    if not 1 <= k <= weight.shape[0]:
        raise ValueError(f"k must lie in 1..{weight.shape[0]}, got {k}")
    values, vectors = torch.linalg.eigh(weight @ second_moment @ weight.t())
    return _signed(vectors.flip(1)[:, :k]), values.flip(0)[:k].clamp_min(0)


def _signed(vectors: Tensor) -> Tensor:
    """Return columns with a sign of their own, whatever the library chose."""
    largest = vectors.abs().argmax(0, keepdim=True)
    return vectors * torch.where(vectors.gather(0, largest) < 0, -1.0, 1.0).to(vectors)


def weakest_directions(
    second_moment: Float[Tensor, "I I"], k: int
) -> tuple[Float[Tensor, "I k"], Float[Tensor, " k"]]:
    """Return the input directions that source data use least (LoRA-Null), the weakest first.

    Args:
        second_moment: ``E[a a^T]`` of a layer's inputs.
        k: How many, in 1..I.

    Returns:
        Orthonormal directions and the mean squares of the inputs along them.

    Raises:
        ValueError: ``k`` is outside 1..I.
    """
    if not 1 <= k <= second_moment.shape[0]:
        raise ValueError(f"k must lie in 1..{second_moment.shape[0]}, got {k}")
    values, vectors = torch.linalg.eigh(second_moment)
    return _signed(vectors[:, :k]), values[:k].clamp_min(0)


def lora_null_init(
    weight: Float[Tensor, "O I"], second_moment: Float[Tensor, "I I"], rank: int
) -> tuple[Float[Tensor, "r I"], Float[Tensor, "O r"], Float[Tensor, "O I"]]:
    """Return factors that start in the directions source inputs hardly use, and what they leave.

    ``W0`` restricted to the ``rank`` weakest input directions becomes ``B A``; the rest stays
    frozen. Both together are ``W0``.

    Args:
        weight: ``W0``.
        second_moment: ``E[a a^T]`` of the layer's inputs on source data.
        rank: Adapter rank, in 1..I.

    Returns:
        ``A``, ``B`` and the residual weight.

    Source:
        LoRA-Null and its code (``decomposition.py``).
    """
    width = weight.shape[1]
    if not 1 <= rank <= min(weight.shape):
        raise ValueError(f"rank must lie in 1..{min(weight.shape)}, got {rank}")
    _, vectors = torch.linalg.eigh(second_moment)
    null = vectors[:, :rank]
    part = weight @ null @ null.t()
    left, singular, right = torch.linalg.svd(part, full_matrices=False)
    root = singular[:rank].sqrt()
    lora_a, lora_b = root[:, None] * right[:rank], left[:, :rank] * root
    assert lora_a.shape == (rank, width)
    return lora_a, lora_b, weight - lora_b @ lora_a

"""Fisher bases and penalties on the worked example: a 3 x 2 layer, four gradients, one change."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from forgetscale.ops.collisions import Collision, collision_pull
from forgetscale.ops.factors import (
    diagonal_pull,
    factor_gradients,
    identity_pull,
    left_pull,
    right_pull,
    two_sided_pull,
    vector_pull,
)
from forgetscale.ops.fisher import (
    contrast_weights,
    explained_rank,
    gram_eigenbasis,
    gram_matrix,
    low_rank_basis,
    principal_cosines,
    side_basis,
)
from forgetscale.ops.penalties import (
    alignment_gradient,
    alignment_penalty,
    basis_coefficients,
    geodesic_overlap,
    geodesic_pulls,
    overlap_weight,
    riemannian_overlap,
    riemannian_pulls,
)

D = torch.float64
GRADS = torch.tensor(
    [[2, 2, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1], [1, -1, 0, 0, 0, 0], [0, 0, 1, -1, 0, 0]], dtype=D
)
FISHER = GRADS.t() @ GRADS / 4
DIAGONAL = torch.tensor([1.25, 1.25, 0.5, 0.5, 0.25, 0.25], dtype=D)
LORA_B = torch.tensor([[1.0], [2], [-1]], dtype=D)
LORA_A = torch.tensor([[1.0, 3]], dtype=D)
DELTA = LORA_B @ LORA_A
X = DELTA.flatten()
DW_A = torch.tensor([[2.0, 2], [1, 1], [1, 1]], dtype=D)
DW_T = torch.tensor([[-1.0, 1], [1, 5], [-2, -4]], dtype=D)
EIGENVALUES = torch.tensor([2.0, 1], dtype=D)


def near(value) -> object:
    return pytest.approx(value, abs=1e-9, rel=1e-9)


@pytest.fixture(params=[torch.float64, torch.float32], ids=["fp64", "fp32"])
def dtype(request) -> torch.dtype:
    return request.param


@pytest.fixture
def basis() -> torch.Tensor:
    return low_rank_basis(GRADS, 2)[0]


class TestBasis:
    def test_worked_eigenpairs(self, dtype):
        basis, values = low_rank_basis(GRADS.to(dtype), 4)
        assert basis.dtype == values.dtype == dtype
        exact = 1e-9 if dtype == D else 1e-5
        assert values.tolist() == pytest.approx([2, 1, 0.5, 0.5], abs=exact)
        u1 = torch.tensor([1, 1, 0, 0, 0, 0], dtype=D) / math.sqrt(2)
        u2 = torch.tensor([0, 0, 1, 1, 1, 1], dtype=D) / 2
        leading = basis[:, :2].double()
        projector = torch.outer(u1, u1) + torch.outer(u2, u2)
        assert torch.allclose(leading @ leading.t(), projector, atol=exact)
        # The pair .5, .5 has no directions of its own, only a span.
        whole = basis.double() @ basis.double().t()
        expected = torch.linalg.pinv(GRADS) @ GRADS
        assert torch.allclose(whole, expected, atol=exact)

    def test_projector_identities(self, basis):
        projector = basis @ basis.t()
        assert torch.allclose(projector @ projector, projector, atol=1e-15)
        assert torch.equal(projector, projector.t()) and float(projector.trace()) == near(2)
        half = projector[:2, :2].tolist()
        assert sum(half, []) == near([0.5] * 4)
        assert projector[2:, 2:].flatten().tolist() == near([0.25] * 16)

    def test_gram_route_is_the_svd_route(self):
        grads = torch.randn(9, 40, dtype=D, generator=torch.Generator().manual_seed(0))
        for m in (1, 4, 9):
            basis, values = low_rank_basis(grads, m)
            _, singular, right = torch.linalg.svd(grads, full_matrices=False)
            assert torch.allclose(values, singular[:m].square() / 9)
            assert torch.allclose(basis @ basis.t(), right[:m].t() @ right[:m], atol=1e-12)

    def test_slices_give_the_same(self):
        whole = gram_matrix(GRADS)
        parts = [GRADS[:, :3], GRADS[:, 3:]]
        assert torch.equal(sum(gram_matrix(part) for part in parts), whole)
        weights, values = gram_eigenbasis(whole, 2)
        slices = torch.cat([part.t() @ weights for part in parts])
        assert torch.allclose(slices, low_rank_basis(GRADS, 2)[0]) and values.tolist() == near(
            [2, 1]
        )

    @pytest.mark.parametrize("m", [0, 5, 6])
    def test_more_directions_than_gradients(self, m: int):
        with pytest.raises(ValueError, match="m must lie in 1..4, the number of gradients"):
            low_rank_basis(GRADS, m)

    def test_more_directions_than_weights(self):
        with pytest.raises(ValueError, match="exceed the 2 weights"):
            low_rank_basis(torch.ones(5, 2), 3)

    def test_directions_beyond_the_span_are_zero(self):
        repeated = torch.cat([GRADS[:1]] * 3)
        basis, values = low_rank_basis(repeated, 3)
        assert values.tolist() == near([8, 0, 0])
        assert torch.equal(basis[:, 1:], torch.zeros(6, 2, dtype=D))

    def test_shape_of_the_weights_does_not_matter(self):
        found = low_rank_basis(GRADS.view(4, 3, 2), 2)
        assert torch.equal(found[0], low_rank_basis(GRADS, 2)[0])

    def test_explained_rank(self):
        values = torch.tensor([2.0, 1, 0.5, 0.5, 0, 0], dtype=D)
        ranks = [
            explained_rank(values, 4.0, explained=share, cap=9)
            for share in (0.3, 0.5, 0.6, 0.75, 0.9, 1.0)
        ]
        assert ranks == [1, 1, 2, 2, 4, 4]
        assert explained_rank(values, 4.0, explained=1.0, cap=3) == 3
        assert explained_rank(torch.zeros(3), 0.0, explained=0.9, cap=3) == 1
        with pytest.raises(ValueError, match="explained"):
            explained_rank(values, 4.0, explained=0.0, cap=1)
        with pytest.raises(ValueError, match="cap"):
            explained_rank(values, 4.0, explained=0.5, cap=0)

    def test_sides(self):
        left = torch.tensor([[2.5, 0, 0], [0, 1, 0.5], [0, 0.5, 0.5]], dtype=D)
        _, values = side_basis(left, 3)
        assert values.tolist() == pytest.approx([2.5, 1.309017, 0.190983], abs=1e-6)
        with pytest.raises(ValueError, match="width of this side"):
            side_basis(left, 4)

    def test_contrast_keeps_what_the_other_data_do_not_need(self):
        generator = torch.Generator().manual_seed(3)
        common, own = torch.randn(2, 30, dtype=D, generator=generator)
        strength = torch.randn(8, 2, dtype=D, generator=generator)
        align = strength[:, :1] * 5 * common + strength[:, 1:] * own
        general = torch.randn(12, 1, dtype=D, generator=generator) * 5 * common
        plain = low_rank_basis(align, 1)[0]
        weights, values, ratios = contrast_weights(align @ align.t(), general @ align.t(), 1)
        kept = align.t() @ weights
        assert kept.norm().item() == near(1.0)
        assert (kept.t() @ (align.t() @ align / 8) @ kept).item() == near(values.item())
        unit = own - (own @ common) / (common @ common) * common
        assert abs(plain[:, 0] @ unit) / unit.norm() < 0.5
        assert abs(kept[:, 0] @ unit) / unit.norm() > 0.95
        assert ratios[0] > 5

    def test_contrast_against_the_same_data_is_even(self):
        gram = GRADS @ GRADS.t()
        weights, values, ratios = contrast_weights(gram, gram, 4, damping=1e-9)
        assert ratios.tolist() == pytest.approx([1] * 4, rel=1e-6)
        assert values.tolist() == pytest.approx([2, 1, 0.5, 0.5])
        basis = GRADS.t() @ weights
        assert torch.allclose(basis.t() @ basis, torch.eye(4, dtype=D), atol=1e-10)
        with pytest.raises(ValueError, match="damping"):
            contrast_weights(gram, gram, 1, damping=0.0)

    def test_contrast_pads_and_survives_nothing(self):
        gram = torch.zeros(3, 3, dtype=D)
        weights, values, ratios = contrast_weights(gram, gram, 2)
        assert not weights.any() and not values.any() and not ratios.any()
        one = torch.ones(3, 3, dtype=D)
        weights, values, ratios = contrast_weights(one, one, 2)
        assert not weights[:, 1].any() and values[1] == 0 and ratios.shape == (2,)

    def test_principal_cosines(self):
        eye = torch.eye(4, dtype=D)
        assert principal_cosines(eye[:, :2], eye[:, 1:3]).tolist() == near([1, 0])


class TestWorkedPenalties:
    def test_parts(self, basis):
        inner = basis_coefficients(DELTA, basis)
        assert sorted(inner.abs().tolist()) == near([2, 2 * math.sqrt(2)])
        part = (basis @ inner).view(3, 2)
        assert torch.allclose(part, DW_A, atol=1e-12)
        assert torch.allclose(DELTA - part, DW_T, atol=1e-12)
        norms = [float(t.square().sum()) for t in (DELTA, DW_A, DW_T)]
        assert norms == [60, 12, 48] and float((DW_A * DW_T).sum()) == 0

    def test_alignment(self, basis, dtype):
        found = alignment_penalty(DELTA.to(dtype), basis.to(dtype), EIGENVALUES.to(dtype))
        assert float(found) == pytest.approx(20, abs=1e-9 if dtype == D else 1e-4)
        assert float(alignment_penalty(X, basis, EIGENVALUES)) == near(20)
        dense = DW_A.flatten() @ FISHER @ DW_A.flatten()
        assert float(dense) == near(20) and float(X @ FISHER @ X) == near(25)
        assert float(X.square() @ DIAGONAL) == near(35)

    def test_task_terms(self):
        t = DW_T.flatten()
        values = [float(t @ t), float(t.square() @ DIAGONAL), float(t @ FISHER @ t)]
        assert values == near([48, 20.5, 5])

    def test_gradient(self, basis):
        grad = alignment_gradient(DELTA, basis, EIGENVALUES)
        assert grad.flatten().tolist() == near([8, 8, 2, 2, 2, 2])
        of_a, of_b = factor_gradients(grad, LORA_A, LORA_B, 1.0)
        # The paper's letters are swapped: its A is lora_B.
        assert of_b.flatten().tolist() == near([32, 8, 8])
        assert of_a.flatten().tolist() == near([10, 10])

    def test_wrong_basis(self, basis):
        with pytest.raises(ValueError, match="basis is for 6 weights, the change has 4"):
            alignment_penalty(torch.ones(2, 2, dtype=D), basis, EIGENVALUES)

    def test_overlap_weight(self):
        eta = overlap_weight(DELTA, beta=5.0, tau=0.01)
        expected = [4.645439612, 5.760601551, 5.398715688, 5.987512943, 4.645439612, 5.760601551]
        assert eta.flatten().tolist() == near(expected)

    @pytest.mark.parametrize(
        ("beta", "reduction", "value"),
        [
            (0.0, "sum", 16),
            (4.0, "sum", 73.985318524),
            (4.0, "mean", 12.330886421),
            (5.0, "sum", 88.481648155),
            (5.0, "mean", 14.746941359),
            (10.0, "sum", 160.963296310),
        ],
    )
    def test_riemannian(self, beta, reduction, value):
        found = riemannian_overlap(DW_A, DW_T, beta=beta, tau=0.01, reduction=reduction)
        assert float(found) == near(value)

    def test_riemannian_gradient(self, basis):
        leaf = X.clone().requires_grad_()
        part = basis @ (basis.t() @ leaf)
        value = riemannian_overlap(part, leaf - part, beta=5.0, tau=0.01, reduction="sum")
        (auto,) = torch.autograd.grad(value, leaf)
        expected = [-3.227833, 16.064934, 22.600036, 22.722137, 10.051718, 9.999999]
        assert auto.tolist() == pytest.approx(expected, abs=1e-6)
        options = {"beta": 5.0, "tau": 0.01, "reduction": "sum"}
        by_task, by_alignment, by_weight = riemannian_pulls(
            DW_A.flatten(), DW_T.flatten(), **options
        )
        closed = basis @ (basis.t() @ (by_task - by_alignment)) + by_alignment + by_weight
        assert torch.allclose(closed, auto, atol=1e-10)

    def test_signed_products_are_not_used(self):
        eta = overlap_weight(DELTA, beta=5.0, tau=0.01)
        assert float((eta * DW_A * DW_T).sum()) == near(5.233318855)

    def test_geodesic(self):
        assert abs(float(geodesic_overlap(DW_A, DW_T))) < 1e-10
        assert abs(float(geodesic_overlap(DW_A, DW_T, FISHER))) < 1e-10
        assert float(geodesic_overlap(DW_A, DW_T, DIAGONAL)) == near(0.009544008484)
        shaped = geodesic_overlap(DW_A, DW_T, DIAGONAL.view(3, 2))
        assert float(shaped) == near(0.009544008484)

    def test_totals(self):
        a, t = DW_A.flatten(), DW_T.flatten()
        geo = float(geodesic_overlap(a, t))

        def total(task: float, beta: float, reduction: str) -> float:
            overlap = riemannian_overlap(a, t, beta=beta, tau=0.01, reduction=reduction)
            return 0.25 * 20 + 0.5 * task + 0.1 * (0.5 * float(overlap) + 0.5 * geo)

        assert total(48, 5.0, "sum") == near(33.424082408)
        assert total(48, 4.0, "sum") == near(32.699265926)
        assert total(20.5, 5.0, "sum") == near(19.674082408)
        assert total(20.5, 4.0, "mean") == near(15.866544321)
        assert total(20.5, 5.0, "mean") == near(15.987347068)

    def test_shards(self, basis):
        cuts = [slice(0, 3), slice(3, 6)]
        parts = [basis_coefficients(X[cut], basis[cut]) for cut in cuts]
        together = parts[0] + parts[1]
        assert torch.allclose(together, basis_coefficients(X, basis))
        order = together.abs().argsort(descending=True)
        assert parts[0][order].abs().tolist() == near([2.8284271247461903, 1])
        assert parts[1][order].abs().tolist() == near([0, 1])
        slices = torch.cat([basis[cut] @ together for cut in cuts])
        assert torch.allclose(slices, DW_A.flatten())

    def test_other_readings(self):
        mask = torch.eye(6, dtype=D)[:, :2]
        values = DIAGONAL[:2]
        assert float(alignment_penalty(X, mask, values)) == near(12.5)
        part = mask @ (mask.t() @ X)
        overlap = riemannian_overlap(part, X - part, beta=5.0, tau=0.01, reduction="sum")
        assert float(overlap) == 0.0
        samples = GRADS.view(4, 3, 2)
        left = torch.einsum("nij,nkj->ik", samples, samples) / 4
        right = torch.einsum("nij,nik->jk", samples, samples) / 4
        assert right.flatten().tolist() == near([2, 1, 1, 2])
        for m, value, overlap in ((1, 25, 0), (2, 43.090169944, 115.777185744)):
            u, lam = side_basis(left, m)
            found = left_pull(u, lam, LORA_A, LORA_B, 1.0)
            part = u @ (u.t() @ DELTA)
            assert float(found.value) == near(value)
            assert float(torch.trace(part.t() @ left @ part)) == near(value)
            terms = riemannian_overlap(part, DELTA - part, beta=5.0, tau=0.01, reduction="sum")
            assert float(terms) == near(overlap)
        v, lam = side_basis(right, 1)
        assert (DELTA @ v @ v.t()).flatten().tolist() == near([2, 2, 4, 4, -2, -2])
        assert float(right_pull(v, lam, LORA_A, LORA_B, 1.0).value) == near(144)
        part = DELTA @ v @ v.t()
        terms = riemannian_overlap(part, DELTA - part, beta=5.0, tau=0.01, reduction="sum")
        assert float(terms) == near(132.713993696)


class TestProperties:
    @given(st.integers(0, 2**31))
    def test_riemannian_is_never_negative(self, seed: int):
        a, t = torch.randn(2, 7, generator=torch.Generator().manual_seed(seed), dtype=D)
        assert float(riemannian_overlap(a, t, beta=5.0, tau=0.01, reduction="sum")) >= 0

    def test_mean_does_not_depend_on_tiling(self):
        options = {"beta": 5.0, "tau": 0.01, "reduction": "mean"}
        once = riemannian_overlap(DW_A, DW_T, **options)
        many = riemannian_overlap(DW_A.repeat(3, 4), DW_T.repeat(3, 4), **options)
        assert float(many) == near(float(once))

    def test_temperature_makes_eta_move(self):
        weights = torch.tensor([0.0, 0.1], dtype=D)
        flat = overlap_weight(weights, beta=5.0, tau=0.01)
        steep = overlap_weight(weights, beta=5.0, tau=0.01, temperature=0.0025)
        assert flat.tolist() == pytest.approx([3.4875, 3.6124], abs=1e-4)
        assert float(steep[1] - steep[0]) > 2.5
        with pytest.raises(ValueError, match="temperature"):
            overlap_weight(weights, beta=1.0, tau=0.1, temperature=0.0)

    def test_weight_as_reference(self):
        weight = torch.randn(3, 2, dtype=D, generator=torch.Generator().manual_seed(1))
        options = {"beta": 5.0, "tau": 0.2, "temperature": 0.1}
        zero = torch.zeros_like(weight)
        assert (
            riemannian_overlap(zero, zero, reduction="sum", weight=weight, **options)
            == riemannian_overlap(zero, zero, reduction="sum", **options)
            == 0
        )
        basis = low_rank_basis(GRADS, 2)[0]
        leaf = X.clone().requires_grad_()
        part = basis @ (basis.t() @ leaf)
        flat = weight.flatten()
        value = riemannian_overlap(part, leaf - part, reduction="mean", weight=flat, **options)
        (auto,) = torch.autograd.grad(value, leaf)
        pulls = riemannian_pulls(
            DW_A.flatten(), DW_T.flatten(), reduction="mean", weight=flat, **options
        )
        closed = basis @ (basis.t() @ (pulls[0] - pulls[1])) + pulls[1] + pulls[2]
        assert torch.allclose(closed, auto, atol=1e-12)

    def test_geodesic_at_the_start_and_its_pulls(self):
        zero = torch.zeros(6, dtype=D)
        assert float(geodesic_overlap(zero, zero)) == 0.0
        a, t = torch.randn(2, 6, dtype=D, generator=torch.Generator().manual_seed(5))
        leaves = a.clone().requires_grad_(), t.clone().requires_grad_()
        auto = torch.autograd.grad(geodesic_overlap(*leaves, DIAGONAL), leaves)
        weighted = DIAGONAL * a, DIAGONAL * t
        inner = [float(x @ y) for x, y in ((weighted[0], t), (weighted[0], a), (weighted[1], t))]
        p, q, r = geodesic_pulls(*inner)
        assert torch.allclose(auto[0], p * weighted[1] + 2 * q * weighted[0], atol=1e-12)
        assert torch.allclose(auto[1], p * weighted[0] + 2 * r * weighted[1], atol=1e-12)

    def test_bad_input(self):
        with pytest.raises(ValueError, match="metric must hold 6 numbers"):
            geodesic_overlap(DW_A, DW_T, torch.ones(5, dtype=D))

    def test_bad_names(self, unchecked):
        with pytest.raises(ValueError, match="reduction must be sum or mean"):
            riemannian_overlap(DW_A, DW_T, beta=1.0, tau=0.1, reduction="median")
        with pytest.raises(ValueError, match="shapes differ"):
            riemannian_overlap(DW_A, X, beta=1.0, tau=0.1, reduction="sum")
        with pytest.raises(ValueError, match="shapes differ"):
            geodesic_overlap(DW_A, X)


def pulls():
    generator = torch.Generator().manual_seed(7)
    out, width, rank = 7, 5, 3
    scale = 0.7
    a = torch.randn(rank, width, dtype=D, generator=generator)
    b = torch.randn(out, rank, dtype=D, generator=generator)
    u = torch.linalg.qr(torch.randn(out, 2, dtype=D, generator=generator))[0]
    v = torch.linalg.qr(torch.randn(width, 2, dtype=D, generator=generator))[0]
    lam = torch.tensor([3.0, 0.5], dtype=D)
    grid = torch.rand(2, 2, dtype=D, generator=generator)
    diagonal = torch.rand(out, width, dtype=D, generator=generator)
    w = torch.linalg.qr(torch.randn(out * width, 2, dtype=D, generator=generator))[0]
    return {
        "identity": (lambda a, b, s: identity_pull(a, b, s), lambda x: x.square().sum()),
        "left": (
            lambda a, b, s: left_pull(u, lam, a, b, s),
            lambda x: (lam[:, None] * (u.t() @ x).square()).sum(),
        ),
        "right": (
            lambda a, b, s: right_pull(v, lam, a, b, s),
            lambda x: (lam * (x @ v).square()).sum(),
        ),
        "two_sided": (
            lambda a, b, s: two_sided_pull(u, v, grid, a, b, s),
            lambda x: (grid * (u.t() @ x @ v).square()).sum(),
        ),
        "diagonal": (
            lambda a, b, s: diagonal_pull(diagonal, a, b, s),
            lambda x: (diagonal * x.square()).sum(),
        ),
        "vector": (
            lambda a, b, s: vector_pull(w, lam, a, b, s),
            lambda x: alignment_penalty(x, w, lam),
        ),
    }, (a, b, scale)


PULLS, FACTORS = pulls()


@pytest.mark.parametrize("kind", sorted(PULLS))
class TestFactors:
    def test_value_and_gradients_are_those_of_the_change(self, kind, monkeypatch):
        monkeypatch.setattr("forgetscale.ops.factors.ROWS_AT_A_TIME", 3)
        pull, dense = PULLS[kind]
        a, b, scale = FACTORS
        leaves = a.clone().requires_grad_(), b.clone().requires_grad_()
        value = dense(scale * leaves[1] @ leaves[0])
        auto = torch.autograd.grad(value, leaves)
        found = pull(a, b, scale)
        assert float(found.value) == near(float(value.detach()))
        assert torch.allclose(found.lora_a, auto[0], atol=1e-10)
        assert torch.allclose(found.lora_b, auto[1], atol=1e-10)

    def test_gauge(self, kind):
        pull, _ = PULLS[kind]
        a, b, scale = FACTORS
        value = float(pull(a, b, scale).value)
        assert float(pull(a, 2 * b, scale / 2).value) == near(value)
        turn = torch.randn(3, 3, dtype=D, generator=torch.Generator().manual_seed(9))
        assert float(pull(torch.linalg.solve(turn, a), b @ turn, scale).value) == near(value)

    def test_zero(self, kind):
        pull, _ = PULLS[kind]
        a, b, scale = FACTORS
        found = pull(a, torch.zeros_like(b), scale)
        assert found.value == 0 and not found.lora_a.any() and not found.lora_b.any()


def test_factor_fisher_is_not_the_fisher_of_the_change():
    """With B = 0 the gradient of A is zero whatever the gradient of the change is."""
    a, b, scale = FACTORS
    grad = torch.ones(7, 5, dtype=D)
    of_a, of_b = factor_gradients(grad, a, torch.zeros_like(b), scale)
    assert not of_a.any() and of_b.any()


def test_basis_of_another_adapter():
    a, b, scale = FACTORS
    with pytest.raises(ValueError, match="basis is for 34 weights, the adapter changes 35"):
        vector_pull(torch.ones(34, 1, dtype=D), torch.ones(1, dtype=D), a, b, scale)


@pytest.mark.parametrize("with_metric", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_collisions_on_factors(monkeypatch, side: str, with_metric: bool):
    monkeypatch.setattr("forgetscale.ops.collisions.ROWS_AT_A_TIME", 3)
    a, b, scale = FACTORS
    size = 7 if side == "left" else 5
    generator = torch.Generator().manual_seed(21)
    basis = torch.linalg.qr(torch.randn(size, 2, dtype=D, generator=generator))[0]
    diagonal = torch.rand(7, 5, dtype=D, generator=generator)
    options = Collision(alpha=0.3, beta=4.0, tau=0.5, temperature=0.2)
    leaves = a.clone().requires_grad_(), b.clone().requires_grad_()
    delta = scale * leaves[1] @ leaves[0]
    projector = basis @ basis.t()
    part = projector @ delta if side == "left" else delta @ projector
    value = 0.3 * riemannian_overlap(
        part, delta - part, beta=4.0, tau=0.5, temperature=0.2, reduction="mean"
    )
    if with_metric:
        value = value + 0.7 * geodesic_overlap(part, delta - part, diagonal)
    auto = torch.autograd.grad(value, leaves)
    metric = (diagonal if side == "left" else diagonal.t()).__getitem__ if with_metric else None
    found = collision_pull(side, basis, a, b, scale, options, metric)
    assert float(found.value) == near(float(value.detach()))
    assert torch.allclose(found.lora_a, auto[0], atol=1e-10)
    assert torch.allclose(found.lora_b, auto[1], atol=1e-10)
    still = collision_pull(side, basis, a, torch.zeros_like(b), scale, options, metric)
    assert still.value == 0 and not still.lora_a.any()

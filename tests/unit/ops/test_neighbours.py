"""Methods next to AlignGuard on the worked change, published forms beside exact ones."""

from __future__ import annotations

import math

import pytest
import torch

from forgetscale.ops.neighbours import (
    alignment_matrix,
    asft_pull,
    clora_pull,
    lora_null_init,
    matrix_cosine,
    olora_pull,
    oplora_factors,
    random_basis,
    safelora_factor,
    salora_basis,
    top_directions,
)

D = torch.float64
LORA_B = torch.tensor([[1.0], [2], [-1]], dtype=D)
LORA_A = torch.tensor([[1.0, 3]], dtype=D)
DELTA = LORA_B @ LORA_A
DIFFERENCE = torch.tensor([[1.0, 0], [1, 1], [0, 1]], dtype=D)


def near(value) -> object:
    return pytest.approx(value, abs=1e-9)


def flat(matrix: torch.Tensor) -> list[float]:
    return matrix.flatten().tolist()


class TestSafeLora:
    def test_published_matrix(self):
        found = alignment_matrix(DIFFERENCE, "published")
        dense = found.dense()
        assert flat(dense) == near([0.5, 0.5, 0, 0.5, 1, 0.5, 0, 0.5, 0.5])
        assert float((dense @ dense - dense).abs().max()) == near(0.5)
        assert float(matrix_cosine(found.apply(DELTA), DELTA)) == near(0.8006407690)
        assert flat(found.apply(DELTA)) == near([1.5, 4.5, 2, 6, 0.5, 1.5])

    def test_exact_projector(self):
        found = alignment_matrix(DIFFERENCE)
        dense = found.dense()
        assert flat(3 * dense) == near([2, 1, -1, 1, 2, 1, -1, 1, 2])
        assert torch.allclose(dense @ dense, dense, atol=1e-12)
        assert float(matrix_cosine(found.apply(DELTA), DELTA)) == near(0.8819171037)
        assert flat(found.apply(DELTA)) == near([5 / 3, 5, 4 / 3, 4, -1 / 3, -1])

    def test_gate(self):
        matrix = alignment_matrix(DIFFERENCE)
        kept, cosine = safelora_factor(LORA_A, LORA_B, matrix, 0.5)
        assert kept is LORA_B and float(cosine) > 0.5
        projected, _ = safelora_factor(LORA_A, LORA_B, matrix, 0.9)
        assert torch.allclose(projected @ LORA_A, matrix.apply(DELTA))

    def test_scale_of_the_published_matrix_is_arbitrary(self):
        once, twice = (alignment_matrix(f * DIFFERENCE, "published").dense() for f in (1, 2))
        assert torch.allclose(twice, 2 * once)
        once, twice = (alignment_matrix(f * DIFFERENCE).dense() for f in (1, 2))
        assert torch.allclose(twice, once)

    def test_nothing_changed_has_no_direction(self):
        assert float(matrix_cosine(torch.zeros(2, 2), torch.ones(2, 2))) == 0.0


@pytest.mark.parametrize(("form", "value"), [("exact", 13.333333333), ("published", 25.0)])
def test_asft(form, value):
    matrix = alignment_matrix(DIFFERENCE, form)
    found = asft_pull(matrix, LORA_A, LORA_B)
    assert float(found.value) == near(value)
    leaves = LORA_A.clone().requires_grad_(), LORA_B.clone().requires_grad_()
    dense = torch.eye(3, dtype=D) - matrix.dense()
    auto = torch.autograd.grad((dense @ leaves[1] @ leaves[0]).square().sum(), leaves)
    assert torch.allclose(found.lora_a, auto[0]) and torch.allclose(found.lora_b, auto[1])
    scaled = asft_pull(matrix, LORA_A, LORA_B, 3.0)
    assert float(scaled.value) == near(9 * float(found.value))


@pytest.mark.parametrize(("form", "value"), [("published", 4.0), ("exact", 16.0)])
def test_olora(form, value):
    previous = torch.tensor([[1.0, 1]], dtype=D)
    found, grad = olora_pull(LORA_A, previous, form)
    assert float(found) == near(value)
    leaf = LORA_A.clone().requires_grad_()
    product = previous @ leaf.t()
    dense = product.abs().sum() if form == "published" else product.square().sum()
    assert torch.allclose(grad, torch.autograd.grad(dense, leaf)[0])


def test_oplora_keeps_the_leading_triples():
    weight = torch.tensor([[3.0, 0], [0, 2], [0, 0]], dtype=D)
    left, right = top_directions(weight, 1)
    a, b = oplora_factors(LORA_A, LORA_B, left, right)
    assert flat(b @ a) == near([0, 0, 0, 6, 0, -3])
    changed = weight + b @ a
    assert torch.allclose(changed @ right, 3 * left * (left.t() @ weight @ right).sign())
    assert torch.allclose(left.t() @ changed, left.t() @ weight)
    with pytest.raises(ValueError, match="k must lie in 1..2"):
        top_directions(weight, 3)


def test_clora():
    side_a = torch.ones(2, 1, dtype=D) / math.sqrt(2)
    side_b = torch.ones(3, 1, dtype=D) / math.sqrt(3)
    assert float(clora_pull(LORA_A.t(), side_a)[0]) == near(8)
    value, grad = clora_pull(LORA_B, side_b)
    assert float(value) == near(1.333333333)
    leaf = LORA_B.clone().requires_grad_()
    auto = torch.autograd.grad((leaf.t() @ side_b).square().sum(), leaf)[0]
    assert torch.allclose(grad, auto)
    drawn = random_basis(6, 3, torch.Generator().manual_seed(0))
    assert torch.allclose(drawn.t() @ drawn, torch.eye(3, dtype=D), atol=1e-12)
    with pytest.raises(ValueError, match="k must lie in 1..2"):
        random_basis(2, 3, torch.Generator())


def test_salora_leaves_outputs_on_safety_inputs():
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(5, 4, dtype=D, generator=generator)
    inputs = torch.randn(4, 2, dtype=D, generator=generator)
    basis = salora_basis(weight, inputs, 2)
    outputs = weight @ inputs
    assert torch.allclose(basis @ (basis.t() @ outputs), outputs)


def test_lora_null_starts_at_the_source_weight():
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(5, 4, dtype=D, generator=generator)
    inputs = torch.randn(4, 2, dtype=D, generator=generator)
    a, b, rest = lora_null_init(weight, inputs @ inputs.t(), 2)
    assert torch.allclose(rest + b @ a, weight)
    # The adapter sees nothing of the source inputs, however it moves within its rows.
    assert float((a @ inputs).abs().max()) < 1e-12
    with pytest.raises(ValueError, match="rank must lie in"):
        lora_null_init(weight, torch.eye(4, dtype=D), 5)

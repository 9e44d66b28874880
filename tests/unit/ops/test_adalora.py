"""AdaLoRA's formulas: budget, importance, ranking, orthogonality."""

from __future__ import annotations

import pytest
import torch

from forgetscale.ops.adalora import (
    keep_triplets,
    orthogonality_pull,
    rank_budget,
    triplet_parts,
    update_importance_,
)


def test_budget_is_a_cubic_rounded_down():
    found = [rank_budget(s, start=100, target=20, first=10, last=30) for s in (0, 10, 20, 25, 30)]
    # 80 * 0.5^3 + 20 = 30; 80 * 0.25^3 + 20 = 21.25
    assert found == [100, 100, 30, 21, 20]
    assert rank_budget(99, start=100, target=20, first=10, last=30) == 20


def test_importance_follows_the_two_running_means():
    w, g = torch.tensor([2.0, -1.0]), torch.tensor([0.5, 3.0])
    sensitivity, uncertainty = torch.zeros(2), torch.tensor([1.0, 0.0])
    update_importance_(sensitivity, uncertainty, w, g, beta1=0.75, beta2=0.5)
    # |w g| = (1, 3); sensitivity 0.25 * it; deviation (0.75, 2.25)
    assert sensitivity.tolist() == [0.25, 0.75]
    assert uncertainty.tolist() == [0.875, 1.125]


@pytest.mark.parametrize("by_row", [True, False])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_parts_of_slices_add_up_to_means_of_triplets(by_row: bool, size: int):
    whole = torch.rand(3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = whole.mean(1) if by_row else whole.mean(0)
    part = -(-whole.numel() // size)
    found = sum(
        triplet_parts(whole.flatten()[s : s + part], s, (3, 5), by_row=by_row)
        for s in range(0, size * part, part)
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_the_largest_scores_are_kept_and_ties_with_the_threshold_go():
    scores = torch.tensor([[3.0, 1.0], [2.0, 4.0]])
    assert keep_triplets(scores, 2).tolist() == [[True, False], [False, True]]
    assert keep_triplets(scores, 4).all() and not keep_triplets(scores, 0).any()
    tied = torch.tensor([[1.0, 1.0], [1.0, 4.0]])
    assert keep_triplets(tied, 3).tolist() == [[False, False], [False, True]]


@pytest.mark.parametrize("by_row", [True, False])
def test_orthogonality_gradient(by_row: bool):
    factor = torch.randn(3, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    factor = factor if by_row else factor.t().contiguous()
    factor.requires_grad_()
    gram = factor @ factor.t() if by_row else factor.t() @ factor
    expected = torch.linalg.matrix_norm(gram - torch.eye(3).double())
    (wanted,) = torch.autograd.grad(expected, factor)
    norm, pull = orthogonality_pull(factor.detach(), by_row=by_row)
    torch.testing.assert_close(norm, expected.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(pull, wanted, rtol=1e-10, atol=1e-12)


def test_an_orthogonal_factor_is_not_pulled():
    norm, pull = orthogonality_pull(torch.eye(2, 5, dtype=torch.float64), by_row=True)
    assert float(norm) == 0.0 and not pull.any()

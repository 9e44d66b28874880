"""Two low-rank matrices made one, against dense ones."""

from __future__ import annotations

import pytest
import torch

from forgetscale.ops.refresh import merge_weights

D = torch.float64


def low_rank(size: int, m: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(size, m, dtype=D, generator=generator))[0]
    return basis, torch.rand(m, dtype=D, generator=generator).sort(descending=True)[0] + 0.5


def merged(first, second, most_added: int) -> tuple[torch.Tensor, torch.Tensor]:
    (u, a), (v, b) = first, second
    weights, values = merge_weights(u.t() @ v, a, b, most_added=most_added)
    return torch.cat([u, v], 1) @ weights, values


def dense(basis: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return (basis * values) @ basis.t()


def test_the_mean_where_nothing_is_cut():
    first, second = low_rank(12, 3, 1), low_rank(12, 4, 2)
    basis, values = merged(first, second, 4)
    assert torch.allclose(basis.t() @ basis, torch.eye(7, dtype=D), atol=1e-12)
    assert torch.allclose(dense(basis, values), (dense(*first) + dense(*second)) / 2, atol=1e-12)
    assert values.tolist() == sorted(values.tolist(), reverse=True)


def test_the_first_span_is_never_cut():
    first, second = low_rank(12, 3, 1), low_rank(12, 4, 2)
    strong = second[0], 100 * second[1]
    for added in (0, 1, 2):
        basis, _ = merged(first, strong, added)
        assert basis.shape == (12, 3 + added)
        assert torch.allclose(basis @ (basis.t() @ first[0]), first[0], atol=1e-12)
    # What is added is what the second one holds most of outside.
    outside = torch.eye(12, dtype=D) - first[0] @ first[0].t()
    top = torch.linalg.eigh(outside @ dense(*strong) @ outside)[1][:, -2:]
    basis, _ = merged(first, strong, 2)
    assert torch.allclose(basis @ (basis.t() @ top), top, atol=1e-10)


def test_the_same_again_changes_nothing():
    first = low_rank(12, 3, 1)
    basis, values = merged(first, first, 3)
    assert basis.shape == (12, 3) and torch.allclose(values, first[1])
    assert torch.allclose(dense(basis, values), dense(*first), atol=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_values_are_what_the_mean_holds_along_them(seed: int):
    first, second = low_rank(9, 4, seed), low_rank(9, 4, seed + 50)
    basis, values = merged(first, second, 2)
    mean = (dense(*first) + dense(*second)) / 2
    assert torch.allclose(basis.t() @ mean @ basis, torch.diag(values), atol=1e-12)
    assert bool((values >= 0).all())


def test_slices_give_the_same():
    first, second = low_rank(10, 3, 1), low_rank(10, 3, 2)
    cross = sum(first[0][rows].t() @ second[0][rows] for rows in (slice(0, 4), slice(4, 10)))
    weights, values = merge_weights(cross, first[1], second[1], most_added=3)
    whole = torch.cat([first[0], second[0]], 1) @ weights
    assert torch.allclose(dense(whole, values), (dense(*first) + dense(*second)) / 2, atol=1e-12)

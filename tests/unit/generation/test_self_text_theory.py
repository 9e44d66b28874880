"""Why text of the model itself holds it in place: a model whose 125 sequences can be listed."""

from __future__ import annotations

import itertools

import pytest
import torch

from forgetscale.ops.losses import cross_entropy

VOCAB, LENGTH = 5, 3
SEQUENCES = torch.tensor(list(itertools.product(range(VOCAB), repeat=LENGTH)))
CONTEXTS = torch.stack(
    [
        torch.zeros(len(SEQUENCES), dtype=torch.int64),
        1 + SEQUENCES[:, 0],
        1 + VOCAB + VOCAB * SEQUENCES[:, 0] + SEQUENCES[:, 1],
    ],
    1,
)
NUM_CONTEXTS = 1 + VOCAB + VOCAB**2


def table(seed: int, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(NUM_CONTEXTS, VOCAB, generator=generator, dtype=torch.float64)


def log_probs(theta: torch.Tensor) -> torch.Tensor:
    """Log-probability of every sequence."""
    return torch.log_softmax(theta, 1)[CONTEXTS, SEQUENCES].sum(1)


def gradients(theta: torch.Tensor) -> torch.Tensor:
    """Gradient of our loss on each sequence, ``[125, parameters]``."""
    rows = []
    for contexts, tokens in zip(CONTEXTS, SEQUENCES, strict=True):
        leaf = theta.clone().requires_grad_()
        cross_entropy(leaf[contexts], tokens).backward()
        rows.append(leaf.grad.flatten())
    return torch.stack(rows)


def test_the_mean_gradient_on_own_text_is_zero_and_its_hessian_the_fisher_matrix():
    theta = table(0)
    p = log_probs(theta).exp()
    each = gradients(theta)
    assert float((p[:, None] * each).sum(0).abs().max()) < 1e-12
    assert float(each.abs().max()) > 0.1  # of single samples it is not
    fisher = (p[:, None, None] * each[:, :, None] * each[:, None, :]).sum(0)

    def own_loss(flat: torch.Tensor) -> torch.Tensor:
        return -(p * log_probs(flat.reshape(theta.shape))).sum()

    hessian = torch.autograd.functional.hessian(own_loss, theta.flatten())
    assert float((hessian - fisher).abs().max()) < 1e-6


def test_sharpened_sampling_pulls_the_model_towards_itself_sharpened():
    theta = table(0)
    sharp = torch.softmax(log_probs(theta) / 0.7, 0)
    pull = (sharp[:, None] * gradients(theta)).sum(0)
    assert float(pull.norm()) > 0.05


def trained(share: float, steps: int = 300) -> torch.Tensor:
    """Train on task text mixed with own text, both as exact expectations."""
    start, task = table(0), log_probs(table(1, 2.0)).exp()
    own = log_probs(start).exp()
    theta = start.clone().requires_grad_()
    for _ in range(steps):
        loss = -(((1 - share) * task + share * own) * log_probs(theta)).sum()
        (grad,) = torch.autograd.grad(loss, theta)
        theta = (theta - 1.0 * grad).detach().requires_grad_()
    return theta.detach()


def test_distance_from_the_source_falls_with_the_share_of_own_text():
    start = table(0)
    p = log_probs(start).exp()
    moved, divergence = [], []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        theta = trained(share)
        moved.append(float((theta - start).norm()))
        divergence.append(float((p * (log_probs(start) - log_probs(theta))).sum()))
    assert moved == sorted(moved, reverse=True)
    assert divergence == sorted(divergence, reverse=True)
    assert divergence[0] > 4 * divergence[2] > 0
    assert moved[-1] == pytest.approx(0, abs=1e-9)
    assert divergence[-1] == pytest.approx(0, abs=1e-12)


def test_soft_targets_pull_on_no_sample_at_the_start():
    """The divergence and its gradient are 0 in every context; of hard targets only the mean is."""
    theta = table(0)
    own = torch.softmax(theta, -1)
    leaf = theta.clone().requires_grad_()
    soft = (own * (torch.log(own) - torch.log_softmax(leaf, -1))).sum(-1)
    (pull,) = torch.autograd.grad(soft.sum(), leaf)
    assert float(soft.detach().abs().max()) < 1e-14
    assert float(pull.abs().max()) < 1e-14
    assert float(gradients(theta).norm(dim=1).min()) > 0.1


def test_a_share_of_nothing_is_plain_training():
    """Without own text the mixed loss is the task's loss, bit for bit."""
    start, task = table(0), log_probs(table(1, 2.0)).exp()
    theta = start.clone().requires_grad_()
    for _ in range(20):
        (grad,) = torch.autograd.grad(-(task * log_probs(theta)).sum(), theta)
        theta = (theta - 1.0 * grad).detach().requires_grad_()
    assert torch.equal(theta.detach(), trained(0.0, 20))

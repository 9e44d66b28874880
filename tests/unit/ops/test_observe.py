"""What is noted about targets: against dense fp64 formulas, however the positions are cut."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from forgetscale.ops import observe
from forgetscale.ops.losses import LOSSES
from forgetscale.ops.observe import landscape_observer, observe_tokens, reference_observer

N, V, D, K = 30, 41, 7, 5


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(N, D, generator=generator, dtype=torch.float64)
    weight = 2 * torch.randn(V, D, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, V, (N,), generator=generator)
    labels[torch.rand(N, generator=generator) < 0.4] = -100
    return hidden, weight, labels


def dense(inputs) -> tuple[Tensor, Tensor]:
    hidden, weight, labels = inputs
    keep = labels != -100
    return (hidden @ weight.t()).log_softmax(-1)[keep], labels[keep]


def test_reference_columns(inputs):
    found = observe_tokens(*inputs, reference_observer(K), chunk_size=4)
    log_p, labels = dense(inputs)
    values, ids = log_p.topk(K, -1)
    assert torch.equal(found["ids"], ids.to(torch.int32))
    assert torch.allclose(found["log_probs"], values)
    assert torch.allclose(found["log_prob"], log_p[torch.arange(len(labels)), labels])
    rest = (1 - values.exp().sum(-1)).log()
    assert torch.allclose(found["log_rest"], rest, rtol=1e-9)


@pytest.mark.parametrize("top_k", [0, V])
def test_reference_of_no_and_of_all_tokens(inputs, top_k: int):
    found = observe_tokens(*inputs, reference_observer(top_k))
    assert found["ids"].shape == (len(dense(inputs)[0]), top_k)
    expected = 0.0 if top_k == 0 else -math.inf
    assert found["log_rest"] == pytest.approx(expected, abs=1e-12)


def test_landscape_columns(inputs):
    found = observe_tokens(*inputs, landscape_observer(K), chunk_size=7)
    log_p, labels = dense(inputs)
    p = log_p.exp()
    assert torch.allclose(found["entropy"], -(p * log_p).sum(-1))
    q = log_p.topk(K, -1).values.softmax(-1)
    assert torch.allclose(found["top_entropy"], -(q * q.log()).sum(-1))
    assert torch.equal(found["best"].long(), p.argmax(-1))
    gradient = (p - torch.nn.functional.one_hot(labels, V)).norm(dim=1)
    assert torch.allclose(found["gradient"], gradient)


def test_gradient_is_that_of_cross_entropy():
    logits = torch.tensor([[4.0, 1, 0, -2], [1, 1, 0, -1], [3, 3, 3, 3]], dtype=torch.float64)
    labels = torch.tensor([1, 0, 2])
    found = observe_tokens(torch.eye(3, dtype=torch.float64), logits.t().contiguous(), labels,
                           landscape_observer(2))  # fmt: skip
    expected = [1.33489384, 0.73805626, 0.86602540]
    assert found["gradient"].tolist() == pytest.approx(expected, abs=6e-9)
    leaf = logits.clone().requires_grad_()
    LOSSES["cross_entropy"](leaf, labels).backward()
    assert torch.allclose(leaf.grad.norm(dim=1), found["gradient"])
    assert found["entropy"].tolist() == pytest.approx([0.2900405037, 1.1726677785, 1.3862943611])


@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_no_token_lies_outside_the_envelope(scale: float):
    """``h_b(p) <= H <= h_b(p) + (1 - p) ln(V - 1)``, with the binary entropy ``h_b``."""
    generator = torch.Generator().manual_seed(1)
    logits = scale * torch.randn(3000, V, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, V, (3000,), generator=generator)
    labels[::3] = logits[::3].argmax(-1)
    found = landscape_observer(20).look(logits.log_softmax(-1), labels)
    p = found["log_prob"].exp()
    binary = torch.special.entr(p) + torch.special.entr(-torch.expm1(found["log_prob"]))
    assert (found["entropy"] >= binary - 1e-9).all()
    assert (found["entropy"] <= binary + (1 - p) * math.log(V - 1) + 1e-9).all()
    assert (found["top_entropy"] <= math.log(20) + 1e-9).all()


@pytest.mark.parametrize("make", [reference_observer, landscape_observer])
@pytest.mark.parametrize(("chunk", "tile"), [(1, 2**22), (100, 3 * V), (6, V)])
def test_cut_does_not_matter(inputs, monkeypatch, make, chunk: int, tile: int):
    expected = observe_tokens(*inputs, make(K))
    monkeypatch.setattr(observe, "TILE_ELEMENTS", tile)
    found = observe_tokens(*inputs, make(K), chunk_size=chunk)
    for name, value in expected.items():
        assert torch.allclose(found[name].double(), value.double(), rtol=1e-12), name


@pytest.mark.parametrize("make", [reference_observer, landscape_observer])
def test_no_target_at_all(inputs, make):
    hidden, weight, labels = inputs
    found = observe_tokens(hidden, weight, torch.full_like(labels, -100), make(K))
    assert all(len(value) == 0 for value in found.values())


def test_label_outside_the_vocabulary(inputs):
    hidden, weight, labels = inputs
    labels[2] = V
    with pytest.raises(ValueError, match="label 41 is outside the vocabulary"):
        observe_tokens(hidden, weight, labels, reference_observer(K))

"""The trained module: loss, scores, and models whose head is not plain."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from forgetscale.errors import ConfigError
from forgetscale.models import CausalLMWithLoss, check_head
from forgetscale.ops import IGNORE_INDEX
from forgetscale.ops.losses import cross_entropy

IDS = torch.tensor([[5, 9, 3, 12, 40, 3], [7, 7, 8, 60, 2, 1]])


@pytest.fixture(params=["plain", "tied"])
def model(request):
    return AutoModelForCausalLM.from_pretrained(request.getfixturevalue(request.param))


def test_loss_and_gradients_are_those_of_the_plain_model(model):
    labels = IDS.clone()
    labels[1, 3:] = IGNORE_INDEX
    wrapped = CausalLMWithLoss(model, chunk_size=3)
    loss = wrapped(IDS, labels, cross_entropy)
    params = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(params.values()))
    logits = model(IDS).logits
    expected = nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1), reduction="sum"
    )
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for name, ours, theirs in zip(
        params, found, torch.autograd.grad(expected, list(params.values())), strict=True
    ):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6), name


def test_scores(model):
    wrapped = CausalLMWithLoss(model, chunk_size=4)
    with torch.no_grad():
        nll, best = wrapped(IDS, labels=IDS, mode="score")
        logits = model(IDS).logits
    expected = -logits[:, :-1].log_softmax(-1).gather(2, IDS[:, 1:, None])[..., 0]
    assert nll.shape == (2, 5) == best.shape
    assert torch.allclose(nll, expected, atol=1e-5)
    assert torch.equal(best, logits[:, :-1].argmax(-1) == IDS[:, 1:])
    check_head((nll, best), logits, IDS)


def test_names_inside_start_with_the_prefix(model):
    wrapped = CausalLMWithLoss(model, chunk_size=4)
    names = [name for name, _ in wrapped.named_parameters()]
    assert all(name.startswith(CausalLMWithLoss.PREFIX) for name in names)
    assert [name.removeprefix("model.") for name in names] == [
        name for name, _ in model.named_parameters()
    ]


@pytest.mark.parametrize("change", ["scaled", "capped", "nan"])
def test_logits_changed_after_the_head_are_refused(plain, change: str):
    model = AutoModelForCausalLM.from_pretrained(plain)
    with torch.no_grad():
        scores = CausalLMWithLoss(model, chunk_size=4)(IDS, labels=IDS, mode="score")
        logits = model(IDS).logits
    other = {
        "scaled": logits / 2,
        "capped": 0.5 * torch.tanh(logits / 0.5),
        "nan": logits * torch.nan,
    }
    with pytest.raises(ConfigError, match="logits are not the output head applied to the last"):
        check_head(scores, other[change], IDS)


def test_a_model_without_linear_head_is_refused():
    class Odd(nn.Module):
        def get_output_embeddings(self):
            return None

    with pytest.raises(ConfigError, match="the output head is NoneType, expected a linear layer"):
        CausalLMWithLoss(Odd(), chunk_size=4)

"""Chunked loss against plain cross-entropy: values, gradients, and the memory it may take."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from forgetscale.ops import IGNORE_INDEX, chunked
from forgetscale.ops.losses import (
    chunked_loss,
    cross_entropy,
    make_loss,
    sample_labels,
    sampled_cross_entropy,
    token_scores,
)

N, D, V = 37, 12, 53


def case(dtype: torch.dtype, seed: int = 0, bias: bool = False) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, V, (N,), generator=generator)
    labels[torch.rand(N, generator=generator) < 0.3] = IGNORE_INDEX
    return {
        "hidden": torch.randn(N, D, generator=generator).to(dtype).requires_grad_(),
        "weight": torch.randn(V, D, generator=generator).to(dtype).requires_grad_(),
        "bias": torch.randn(V, generator=generator).to(dtype).requires_grad_() if bias else None,
        "labels": labels,
    }


def plain(c: dict, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """Return loss and gradients of undivided code in ``dtype``, logits in fp32 or wider."""
    inputs = [c[k].detach().to(dtype).requires_grad_() for k in ("hidden", "weight")]
    if c["bias"] is not None:
        inputs.append(c["bias"].detach().to(dtype).requires_grad_())
    logits = torch.nn.functional.linear(*inputs)
    wide = logits if dtype == torch.float64 else logits.float()
    loss = torch.nn.functional.cross_entropy(
        wide, c["labels"], ignore_index=IGNORE_INDEX, reduction="sum"
    )
    return loss.detach(), list(torch.autograd.grad(loss, inputs))


def ours(c: dict, chunk_size: int) -> tuple[Tensor, list[Tensor]]:
    inputs = [c["hidden"], c["weight"]] + ([c["bias"]] if c["bias"] is not None else [])
    loss = chunked_loss(
        c["hidden"], c["weight"], c["labels"], cross_entropy, bias=c["bias"], chunk_size=chunk_size
    )
    return loss.detach(), list(torch.autograd.grad(loss, inputs))


def error(found: list[Tensor], exact: list[Tensor]) -> float:
    return math.sqrt(
        sum(float((a.double() - b).square().sum()) for a, b in zip(found, exact, strict=True))
    )


@pytest.mark.parametrize("chunk_size", [1, 5, 36, 37, 1000])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_at_most_twice_that_of_plain_code(dtype, bias: bool, chunk_size: int):
    c = case(dtype, bias=bias)
    exact_loss, exact = plain(c, torch.float64)
    plain_loss, theirs = plain(c, dtype)
    loss, found = ours(c, chunk_size)
    assert loss.dtype == torch.float32
    for mine, reference, other in zip(found, exact, theirs, strict=True):
        assert mine.dtype == dtype
        # The floor is one rounding of the result itself, which plain code may escape by luck.
        floor = torch.finfo(dtype).eps * float(reference.norm())
        assert error([mine], [reference]) <= 2 * error([other], [reference]) + floor
    floor = 1e-6 * float(exact_loss)
    assert abs(loss - exact_loss) <= 2 * abs(plain_loss - exact_loss) + floor


def test_value_scale_and_gradient_scale():
    c = case(torch.float32)
    _, expected = ours(c, 7)
    loss = chunked_loss(c["hidden"], c["weight"], c["labels"], cross_entropy, chunk_size=7)
    found = torch.autograd.grad(loss * 0.25, [c["hidden"], c["weight"]])
    for mine, full in zip(found, expected, strict=True):
        assert torch.allclose(mine, full * 0.25, rtol=1e-6)


def test_gradcheck_by_differences():
    c = case(torch.float32, seed=4)
    _, (grad, _) = ours(c, 8)
    direction = torch.randn(N, D, generator=torch.Generator().manual_seed(1))
    step = 1e-2
    values = [
        chunked_loss(c["hidden"] + s * direction, c["weight"], c["labels"], cross_entropy).item()
        for s in (step, -step)
    ]
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(
        float((grad * direction).sum()), rel=2e-3
    )


def test_no_target_gives_zero_with_a_gradient():
    c = case(torch.float32)
    c["labels"] = torch.full((N,), IGNORE_INDEX)
    loss, grads = ours(c, 10)
    assert loss == 0
    assert all(float(grad.abs().max()) == 0 for grad in grads)


def test_labels_to_ignore_do_not_count():
    c = case(torch.float32)
    keep = c["labels"] != IGNORE_INDEX
    some = {**c, "hidden": c["hidden"][keep].detach(), "labels": c["labels"][keep]}
    expected, _ = plain(some, torch.float64)
    assert ours(c, 9)[0] == pytest.approx(float(expected), rel=1e-6)


class LargestTensor(TorchDispatchMode):
    """Remember the largest result of any operation."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor):
                self.numel = max(self.numel, value.numel())
        return result


@pytest.mark.parametrize("grad", [True, False])
def test_whole_logits_never_exist(grad: bool):
    positions, vocab, chunk = 256, 499, 16
    hidden = torch.randn(positions, 8, requires_grad=grad)
    weight = torch.randn(vocab, 8, requires_grad=grad)
    labels = torch.randint(0, vocab, (positions,))
    with LargestTensor() as largest:
        loss = chunked_loss(hidden, weight, labels, cross_entropy, chunk_size=chunk)
        if grad:
            loss.backward()
        token_scores(hidden.detach(), weight.detach(), labels, chunk_size=chunk)
    assert 0 < largest.numel <= max(chunk * vocab, weight.numel(), hidden.numel())
    assert largest.numel < positions * vocab / 8


def test_only_asked_gradients_are_made():
    c = case(torch.float32)
    weight = c["weight"].detach()
    loss = chunked_loss(c["hidden"], weight, c["labels"], cross_entropy, chunk_size=7)
    loss.backward()
    assert weight.grad is None
    _, (expected, _) = ours(c, 7)
    assert torch.equal(c["hidden"].grad, expected)


@pytest.mark.parametrize("tile", [1, 7, 2**22])
@pytest.mark.parametrize(
    ("kept", "wanted"),
    [
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float64, torch.float64),
    ],
)
def test_gradients_are_rescaled_where_they_lie(monkeypatch, tile: int, kept, wanted):
    monkeypatch.setattr(chunked, "TILE_ELEMENTS", tile)
    grad = torch.randn(9, 5, generator=torch.Generator().manual_seed(1)).to(kept)
    scale = torch.tensor(0.3)
    expected = (grad.to(torch.promote_types(kept, torch.float32)) * scale).to(wanted)
    found = chunked.rescale_(grad, scale, wanted)
    assert found.dtype == wanted and torch.equal(found, expected)
    assert found.data_ptr() == grad.data_ptr()


def test_chunk_size_must_be_positive():
    c = case(torch.float32)
    with pytest.raises(ValueError, match="chunk_size must be > 0, got 0"):
        chunked_loss(c["hidden"], c["weight"], c["labels"], cross_entropy, chunk_size=0)


def test_token_scores():
    c = case(torch.float32, bias=True)
    labels = c["labels"].clamp_min(0)
    logits = torch.nn.functional.linear(*[c[k].double() for k in ("hidden", "weight", "bias")])
    nll, best = token_scores(c["hidden"], c["weight"], labels, bias=c["bias"], chunk_size=10)
    expected = -logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]
    assert torch.allclose(nll.double(), expected, atol=1e-5)
    assert torch.equal(best, logits.argmax(1) == labels)
    assert not nll.requires_grad


class TestSampledLabels:
    def test_inverse_of_the_cumulative_distribution(self):
        logits = torch.tensor([0.2, 0.3, 0.5]).log().expand(6, 3)
        numbers = torch.tensor([0.0, 0.19, 0.21, 0.49, 0.51, 0.999], dtype=torch.float64)
        assert sample_labels(logits, numbers).tolist() == [0, 0, 1, 1, 2, 2]

    def test_what_is_impossible_is_never_drawn(self):
        logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).expand(3, 5)
        numbers = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
        assert sample_labels(logits, numbers).tolist() == [1, 3, 3]

    def test_frequencies(self):
        generator = torch.Generator().manual_seed(2)
        logits = 2 * torch.randn(1, 7, generator=generator)
        numbers = torch.rand(20_000, generator=generator, dtype=torch.float64)
        drawn = sample_labels(logits.expand(20_000, 7), numbers)
        share = torch.bincount(drawn, minlength=7) / 20_000
        # Standard deviation of a share is at most 0.0036.
        assert (share - logits[0].softmax(0)).abs().max() < 0.015

    @pytest.mark.parametrize("chunk_size", [1, 7, 100])
    def test_loss_finds_its_numbers_in_any_chunk(self, chunk_size: int):
        generator = torch.Generator().manual_seed(3)
        hidden, weight = (torch.randn(n, 5, generator=generator) for n in (150, 9))
        numbers = torch.rand(200, generator=generator, dtype=torch.float64)
        places = torch.randperm(200, generator=generator)[:150]
        places[3] = -100
        logits = hidden @ weight.t()
        drawn = sample_labels(logits, numbers[places.clamp_min(0)])
        drawn[3] = -100
        loss = sampled_cross_entropy(numbers)
        found = chunked_loss(hidden, weight, places, loss, chunk_size=chunk_size)
        assert torch.allclose(found, cross_entropy(logits, drawn), rtol=1e-5)


@pytest.mark.parametrize("kind", ["cross_entropy", "eaft"])
def test_runs_without_values(monkeypatch, kind: str):
    """On fake tensors, which tell memory and operations of a pass, all positions are taken."""
    monkeypatch.setattr(chunked, "target_rows", lambda labels, size, check: None)
    with FakeTensorMode():
        hidden, weight = (torch.empty(n, D, requires_grad=True) for n in (N, V))
        loss = chunked_loss(hidden, weight, torch.zeros(N).long(), make_loss(kind), chunk_size=7)
        loss.backward()
    assert hidden.grad.shape == (N, D) and weight.grad.shape == (V, D)


def test_positions_without_target_cost_no_product():
    hidden = torch.full((6, D), torch.nan)
    hidden[2:4] = 1.0
    weight = torch.randn(V, D, requires_grad=True)
    labels = torch.tensor([-100, -100, 3, 4, -100, -100])
    hidden.requires_grad_()
    loss = chunked_loss(hidden, weight, labels, cross_entropy, chunk_size=1)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(weight.grad).all()
    assert (hidden.grad[[0, 1, 4, 5]] == 0).all() and (hidden.grad[2:4] != 0).any()

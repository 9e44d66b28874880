"""Token losses: pure functions of logits and labels that return a sum over target positions.

Shape letters: N positions, V vocabulary, D model width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Float32, Float64, Int64
from torch import Tensor

from forgetscale.ops import IGNORE_INDEX

LossFunction = Callable[[Tensor, Tensor], Tensor]
"""``(logits [N, V], labels [N]) -> [] fp32``: a sum over positions, so that chunks may be added."""


def cross_entropy(logits: Float[Tensor, "N V"], labels: Int64[Tensor, " N"]) -> Float32[Tensor, ""]:
    """Return the negative log-likelihood in nats, summed over target positions, in fp32.

    Args:
        logits: Raw scores of one chunk of positions, any float type.
        labels: Target ids; ``IGNORE_INDEX`` marks positions without loss. With no target at all
            the result is 0 and still carries a (zero) gradient.
    """
    return torch.nn.functional.cross_entropy(
        logits.float(), labels, ignore_index=IGNORE_INDEX, reduction="sum"
    )


def sample_labels(
    logits: Float[Tensor, "N V"], uniform: Float64[Tensor, " N"]
) -> Int64[Tensor, " N"]:
    """Draw one token per position from the model's own prediction.

    The draw is a function of the logits and one number per position, by the inverse of the
    cumulative distribution in fp64; a few positions at a time, to bound memory.

    Args:
        logits: Raw scores, any float type.
        uniform: Numbers in [0, 1), one per position.
    """
    found = []
    for start in range(0, logits.shape[0], 64):
        part = slice(start, start + 64)
        total = torch.softmax(logits[part].detach().double(), -1).cumsum(-1)
        place = torch.searchsorted(total, uniform[part, None] * total[:, -1:], right=True)
        found.append(place[:, 0].clamp_max(logits.shape[-1] - 1))
    return torch.cat(found)


def sampled_cross_entropy(uniform: Float64[Tensor, " positions"]) -> LossFunction:
    """Return cross-entropy against tokens that the model itself draws.

    Args:
        uniform: Numbers in [0, 1). The labels given to the loss are places in this vector, so that
            any chunk of positions finds its numbers; ``IGNORE_INDEX`` still means no loss.
    """

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        drawn = sample_labels(logits, uniform[labels.clamp_min(0)])
        return cross_entropy(logits, torch.where(labels == IGNORE_INDEX, labels, drawn))

    return loss


class _ChunkedLoss(torch.autograd.Function):
    """Loss over the vocabulary without the whole logits: gradients are made chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        trained: Tensor,
        rows: Tensor | None,
        bias: Tensor | None,
        labels: Tensor,
        loss: LossFunction,
        chunk_size: int,
        wants: tuple[bool, bool, bool],
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        wants_hidden, wants_weight, wants_bias = wants
        hidden_grad = torch.empty_like(hidden) if wants_hidden else None
        wide = torch.promote_types(weight.dtype, torch.float32)
        weight_grad = torch.zeros_like(trained, dtype=wide) if wants_weight else None
        bias_grad = torch.zeros_like(bias, dtype=wide) if wants_bias and bias is not None else None
        for start in range(0, hidden.shape[0], chunk_size):
            part = slice(start, start + chunk_size)
            chunk = hidden[part]
            logits = torch.nn.functional.linear(chunk, weight, bias)
            if not any(wants):
                total += loss(logits, labels[part])
                continue
            with torch.enable_grad():
                logits.requires_grad_()
                value = loss(logits, labels[part])
                (logits_grad,) = torch.autograd.grad(value, logits)
            total += value.detach()
            if hidden_grad is not None:
                torch.mm(logits_grad, weight, out=hidden_grad[part])
            if weight_grad is not None:
                moving = logits_grad if rows is None else logits_grad.index_select(1, rows)
                weight_grad += moving.t() @ chunk
            if bias_grad is not None:
                bias_grad += logits_grad.to(wide).sum(0)
        ctx.found = (hidden_grad, weight_grad, bias_grad)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = grads
        if ctx.found is None:
            raise RuntimeError("the chunked loss can be differentiated once; run forward again")
        scaled: list[Tensor | None] = []
        for grad, dtype in zip(ctx.found, ctx.dtypes, strict=True):
            if grad is None:
                scaled.append(None)
                continue
            # In fp32 or better, rounded once: a bf16 factor would bias all gradients alike.
            wide = torch.promote_types(grad.dtype, torch.float32)
            scaled.append(grad.to(wide).mul_(scale.to(wide)).to(dtype))
        ctx.found = None
        hidden, trained, bias = scaled
        return (hidden, None, trained, None, bias, None, None, None, None)


def chunked_loss(
    hidden: Float[Tensor, "N D"],
    weight: Float[Tensor, "V D"],
    labels: Int64[Tensor, " N"],
    loss: LossFunction,
    *,
    bias: Float[Tensor, " V"] | None = None,
    trained_rows: tuple[Float[Tensor, "P D"], Int64[Tensor, " P"]] | None = None,
    chunk_size: int = 1024,
) -> Float32[Tensor, ""]:
    """Apply the output head and a loss, ``chunk_size`` positions at a time.

    At most ``[chunk_size, V]`` logits exist at once, and the head's weight is read once: the
    gradients are computed together with the value and only scaled in backward, so ZeRO-3 gathers
    the head a single time for both. Costs three head-sized matmuls, as plain code does.

    Args:
        hidden: Last hidden states of the positions, any float type.
        weight: Output head ``[vocab, width]``.
        labels: Target ids, already shifted; ``IGNORE_INDEX`` marks positions without loss.
        loss: Any ``LossFunction``; it must be a sum over positions.
        bias: Bias of the head, if the model has one.
        trained_rows: Where only some rows of the head are trained: the parameter that holds them
            and their ids. ``weight`` is then a plain tensor and gets no gradient.
        chunk_size: Positions per chunk, > 0.

    Returns:
        The summed loss in nats, fp32, differentiable once in ``hidden``, ``weight`` (or the
        parameter in ``trained_rows``) and ``bias``.

    Raises:
        ValueError: ``chunk_size`` is not positive.
    """
    if chunk_size <= 0:
        raise ValueError(f"chunk_size must be > 0, got {chunk_size}")
    grad = torch.is_grad_enabled()
    trained, rows = (weight, None) if trained_rows is None else trained_rows
    wants = (
        grad and hidden.requires_grad,
        grad and trained.requires_grad,
        grad and bias is not None and bias.requires_grad,
    )
    result = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]
        hidden, weight.detach(), trained, rows, bias, labels, loss, chunk_size, wants
    )
    assert isinstance(result, Tensor)
    return result


@torch.no_grad()
def token_scores(
    hidden: Float[Tensor, "N D"],
    weight: Float[Tensor, "V D"],
    labels: Int64[Tensor, " N"],
    *,
    bias: Float[Tensor, " V"] | None = None,
    chunk_size: int = 1024,
) -> tuple[Float32[Tensor, " N"], Bool[Tensor, " N"]]:
    """Return per-position negative log-likelihood (nats) and whether the label is the argmax.

    Args:
        hidden: Last hidden states of the positions.
        weight: Output head.
        labels: Ids to score, in ``0..vocab-1`` everywhere.
        bias: Bias of the head, if the model has one.
        chunk_size: Positions whose logits exist at one time, > 0.
    """
    nll = torch.empty(labels.shape[0], dtype=torch.float32, device=hidden.device)
    best = torch.empty(labels.shape[0], dtype=torch.bool, device=hidden.device)
    for start in range(0, hidden.shape[0], chunk_size):
        part = slice(start, start + chunk_size)
        logits = torch.nn.functional.linear(hidden[part], weight, bias).float()
        chosen = logits.gather(1, labels[part, None])[:, 0]
        nll[part] = torch.logsumexp(logits, 1) - chosen
        best[part] = logits.argmax(1) == labels[part]
    return nll, best

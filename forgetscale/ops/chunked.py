"""Losses over a large vocabulary: logits of a few positions at a time, gradients in their place.

Of a ``TokenLoss`` the gradient is known in closed form. Its kernel reads the logits of some
positions once and, where asked, overwrites them by their gradient; nothing of the size of the
logits outlives a tile of positions but the logits themselves. ``chunked_loss`` puts the output head
around it, so that even those exist for one chunk of positions only.

Shape letters: N positions, V vocabulary, D model width, P trained rows of the head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from forgetscale.ops import IGNORE_INDEX
from forgetscale.ops.gates import Gate, TokenStats, TokenTerms

LossFunction = Callable[[Tensor, Tensor], Tensor]
"""``(logits [N, V], labels [N]) -> [] fp32``: a sum over positions, so that chunks may be added."""

TILE_ELEMENTS = 2**22
"""Logits taken at a time by the kernel: 16 MiB of fp32 scratch, whatever the chunk."""
GATED_BELOW = 0.5
"""A token with a smaller weight counts as gated."""


class LossSums(NamedTuple):
    """Sums over target positions that lie beside the loss; plain numbers."""

    value: float
    """The loss, in nats."""
    weight: float
    num_gated: float
    """Positions whose weight is below ``GATED_BELOW``."""
    nll: float
    """Plain cross-entropy, in nats."""


class LossRecord:
    """Adds up ``LossSums`` over chunks and micro-batches, on the device, without waiting for it."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None

    def add(self, sums: Tensor) -> None:
        """Add the kernel's sums."""
        self._sums = sums.clone() if self._sums is None else self._sums.add_(sums)

    def sums(self) -> Tensor:
        """Return the sums so far, ``[4]`` fp64 in the order of ``LossSums``; zeros if none."""
        if self._sums is None:
            return torch.zeros(len(LossSums._fields), dtype=torch.float64)
        return self._sums


@dataclass(frozen=True, slots=True)
class TokenLoss:
    """A loss given by its gate: callable on logits, and known to ``chunked_loss`` by its gradient.

    Weights carry no gradient of their own; where a form's factor has one, its scale includes it.
    """

    gate: Gate
    normalize: Literal["tokens", "weights"] = "tokens"
    """What the engine divides the step's sum by: target tokens, or the sum of their weights. Both
    are counted over all ranks and micro-batches of the step."""
    gates: bool = True
    """Tokens count differently, so that the mean weight is worth reporting."""
    needs: tuple[str, ...] = ()
    """Names of the tensors per position (``extra``) without which it cannot be computed."""

    def __call__(
        self,
        logits: Float[Tensor, "N V"],
        labels: Int64[Tensor, " N"],
        extra: Mapping[str, Tensor] | None = None,
    ) -> Float32[Tensor, ""]:
        """Return the loss in nats, summed over target positions, not yet normalised.

        Computed in fp32 or wider. With no target at all the result is 0 and still carries a (zero)
        gradient.

        Args:
            logits: Raw scores of one chunk of positions, any float type.
            labels: Target ids; ``IGNORE_INDEX`` marks positions without loss.
            extra: More tensors per position, by name, for losses that need them.

        Raises:
            ValueError: A label is outside the vocabulary, or the loss lacks a tensor.
        """
        target_rows(labels, logits.shape[1])
        result = _DirectLoss.apply(  # type: ignore[no-untyped-call]
            logits, labels, self, dict(extra or {}), torch.is_grad_enabled()
        )
        assert isinstance(result, Tensor)
        return result

    def sums(
        self,
        logits: Float[Tensor, "N V"],
        labels: Int64[Tensor, " N"],
        extra: Mapping[str, Tensor] | None = None,
    ) -> LossSums:
        """Return the loss and the sums beside it, without gradient.

        Args:
            logits: As for the call.
            labels: As for the call.
            extra: As for the call.
        """
        found = evaluate_(logits.detach(), labels, self, dict(extra or {}), gradient=False)
        return LossSums(*found.tolist())


def target_rows(
    labels: Int64[Tensor, " N"], size: int, *, check: bool = True
) -> Int64[Tensor, " M"] | None:
    """Return the positions that have a target, or None if all have; waits for the device once.

    The only place where the loss looks at values on the host: a trace without values replaces it.

    Args:
        labels: Target ids.
        size: Tokens in the vocabulary.
        check: Whether targets must lie in the vocabulary.

    Raises:
        ValueError: A label is outside the vocabulary.
    """
    keep = labels != IGNORE_INDEX
    outside = keep & ((labels < 0) | (labels >= size))
    everything, wrong = torch.stack([keep.all(), outside.any()]).tolist()
    if check and wrong:
        raise ValueError(
            f"label {int(labels[outside][0])} is outside the vocabulary (0..{size - 1}, or"
            f" {IGNORE_INDEX} for no loss); the tokens were made with another tokenizer, or the"
            " head is too small"
        )
    return None if everything else keep.nonzero()[:, 0]


@torch.no_grad()
def evaluate_(
    logits: Float[Tensor, "N V"],
    labels: Int64[Tensor, " N"],
    loss: TokenLoss,
    extra: Mapping[str, Tensor],
    *,
    gradient: bool,
) -> Float[Tensor, " sums"]:
    """Return the sums of a loss in fp64; with ``gradient``, overwrite the logits by theirs.

    Args:
        logits: Raw scores. Changed in place if ``gradient`` is set.
        labels: Target ids in the vocabulary; ``IGNORE_INDEX`` marks positions without loss.
        loss: What to compute.
        extra: More tensors per position, by name.
        gradient: Whether the gradient is wanted.
    """
    sums = torch.zeros(len(LossSums._fields), dtype=torch.float64, device=logits.device)
    rows = max(1, TILE_ELEMENTS // logits.shape[1])
    for start in range(0, logits.shape[0], rows):
        part = slice(start, start + rows)
        mine = {name: value[part] for name, value in extra.items()}
        sums += _evaluate_tile(logits[part], labels[part], loss.gate, mine, gradient)
    return sums


def _evaluate_tile(
    logits: Tensor, labels: Tensor, gate: Gate, extra: Mapping[str, Tensor], gradient: bool
) -> Tensor:
    ignored = labels == IGNORE_INDEX
    wide = torch.promote_types(logits.dtype, torch.float32)
    log_probs = torch.log_softmax(logits, -1, dtype=wide)
    stats = TokenStats(log_probs, labels.masked_fill(ignored, 0), extra)
    terms = gate(stats)
    columns = (
        terms.value,
        terms.weight,
        (terms.weight < GATED_BELOW).to(wide),
        -stats.log_prob,
    )
    sums = torch.stack([x.masked_fill(ignored, 0).sum(dtype=torch.float64) for x in columns])
    if gradient:
        _write_gradient(logits, stats, terms, ignored)
    return sums


def _write_gradient(logits: Tensor, stats: TokenStats, terms: TokenTerms, ignored: Tensor) -> None:
    """Write ``scale (P - e_y) + anchor`` over the logits, 0 for positions without loss."""
    scale = terms.scale.masked_fill(ignored, 0)[:, None]
    labels = stats.labels[:, None]
    grad = stats.take_probs()
    anchor = terms.anchor
    if anchor is None:
        grad.scatter_add_(1, labels, torch.full_like(scale, -1))
        # Multiplied and rounded to the type of the logits in one pass.
        torch.mul(grad, scale, out=logits)
        return
    own = None if anchor.ids is None else grad.gather(1, anchor.ids)
    grad.mul_(terms.scale[:, None] + anchor.mass[:, None])
    if anchor.uniform:
        grad.add_(anchor.uniform)
    if anchor.ids is not None and anchor.put is not None and own is not None:
        grad.scatter_(1, anchor.ids, own * terms.scale[:, None] + anchor.put)
    grad.scatter_add_(1, labels, -terms.scale[:, None])
    logits.copy_(grad.masked_fill_(ignored[:, None], 0))


class _DirectLoss(torch.autograd.Function):
    """A token loss of logits that exist anyway."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        loss: TokenLoss,
        extra: Mapping[str, Tensor],
        grad_enabled: bool,
    ) -> Tensor:
        wants = grad_enabled and ctx.needs_input_grad[0]
        buffer = logits.detach().clone() if wants else logits.detach()
        sums = evaluate_(buffer, labels, loss, extra, gradient=wants)
        if wants:
            ctx.save_for_backward(buffer)
        return sums[0].float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return grad * grads[0].to(grad.dtype), None, None, None, None


@dataclass(slots=True)
class _Head:
    """Output head of one pass and the sums of its gradients."""

    weight: Tensor
    bias: Tensor | None
    rows: Tensor | None
    weight_grad: Tensor | None
    bias_grad: Tensor | None
    buffer: Tensor = field(init=False)

    def logits(self, hidden: Tensor, chunk_size: int) -> Tensor:
        """Return the logits of a chunk, in memory that the next chunk uses again."""
        if not hasattr(self, "buffer"):
            rows = min(chunk_size, hidden.shape[0])
            self.buffer = hidden.new_empty(rows, self.weight.shape[0])
        out = self.buffer[: hidden.shape[0]]
        if self.bias is None:
            return torch.mm(hidden, self.weight.t(), out=out)
        return torch.addmm(self.bias, hidden, self.weight.t(), out=out)

    def add(self, logits_grad: Tensor, hidden: Tensor) -> None:
        """Add a chunk's part to the gradients of weight and bias."""
        if self.weight_grad is not None:
            rows = self.rows
            moving = logits_grad if rows is None else logits_grad.index_select(1, rows)
            add_product_(self.weight_grad, moving, hidden)
        if self.bias_grad is not None:
            self.bias_grad += logits_grad.sum(0, dtype=self.bias_grad.dtype)


def add_product_(
    total: Float[Tensor, "P D"], left: Float[Tensor, "N P"], right: Float[Tensor, "N D"]
) -> None:
    """Add ``left^T right`` to ``total`` without another tensor of its size.

    Args:
        total: Sum so far, of the type of the factors or wider.
        left: First factor.
        right: Second factor.
    """
    if total.dtype == left.dtype:
        total.addmm_(left.t(), right)
        return
    rows = max(1, TILE_ELEMENTS // right.shape[1])
    for start in range(0, total.shape[0], rows):
        part = slice(start, start + rows)
        total[part] += left[:, part].t() @ right


def rescale_(grad: Tensor, scale: Float[Tensor, ""], dtype: torch.dtype) -> Tensor:
    """Return ``grad * scale`` in a type that is not wider, in the memory of ``grad``.

    Multiplied in fp32 or better and rounded once: a bf16 factor would bias all gradients alike. A
    narrower result is written over what was read before it, so that the fp32 sum over chunks of a
    head's gradient and its bf16 copy never exist together.

    Args:
        grad: Contiguous; its content is lost.
        scale: Factor.
        dtype: Type of the result.
    """
    wide = torch.promote_types(grad.dtype, torch.float32)
    factor = scale.to(wide)
    if grad.dtype == dtype == wide:
        return grad.mul_(factor)
    flat = grad.view(-1)
    out = flat.view(dtype)[: flat.numel()]
    for start in range(0, flat.numel(), TILE_ELEMENTS):
        part = slice(start, start + TILE_ELEMENTS)
        out[part] = (flat[part].to(wide) * factor).to(dtype)
    return out.view(grad.shape)


def _step(
    logits: Tensor, labels: Tensor, loss: LossFunction, extra: Mapping[str, Tensor], grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the sums of a chunk (of a plain function its value alone) and its gradient."""
    if isinstance(loss, TokenLoss):
        return evaluate_(logits, labels, loss, extra, gradient=grad), logits
    if not grad:
        return loss(logits, labels).double().view(1), None
    with torch.enable_grad():
        leaf = logits.detach().requires_grad_()
        value = loss(leaf, labels)
        (found,) = torch.autograd.grad(value, leaf)
    return value.detach().double().view(1), found


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
        extra: Mapping[str, Tensor],
        chunk_size: int,
        wants: tuple[bool, bool, bool],
        record: LossRecord | None,
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        wants_hidden, wants_weight, wants_bias = wants
        hidden_grad = torch.empty_like(hidden) if wants_hidden else None
        wide = torch.promote_types(weight.dtype, torch.float32)
        head = _Head(
            weight,
            bias,
            rows,
            torch.zeros_like(trained, dtype=wide) if wants_weight else None,
            torch.zeros_like(bias, dtype=wide) if wants_bias and bias is not None else None,
        )
        for start in range(0, hidden.shape[0], chunk_size):
            part = slice(start, start + chunk_size)
            logits = head.logits(hidden[part], chunk_size)
            mine = {name: value[part] for name, value in extra.items()}
            sums, logits_grad = _step(logits, labels[part], loss, mine, any(wants))
            total += sums[0]
            if record is not None:
                record.add(sums)
            if logits_grad is None or not any(wants):
                continue
            if hidden_grad is not None:
                torch.mm(logits_grad, weight, out=hidden_grad[part])
            head.add(logits_grad, hidden[part])
        ctx.found = (hidden_grad, head.weight_grad, head.bias_grad)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return total.float()

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
            scaled.append(rescale_(grad, scale, dtype))
        ctx.found = None
        hidden, trained, bias = scaled
        return (hidden, None, trained, None, bias, *[None] * 6)


def chunked_loss(
    hidden: Float[Tensor, "N D"],
    weight: Float[Tensor, "V D"],
    labels: Int64[Tensor, " N"],
    loss: LossFunction,
    *,
    bias: Float[Tensor, " V"] | None = None,
    trained_rows: tuple[Float[Tensor, "P D"], Int64[Tensor, " P"]] | None = None,
    extra: Mapping[str, Tensor] | None = None,
    chunk_size: int = 1024,
    record: LossRecord | None = None,
) -> Float32[Tensor, ""]:
    """Apply the output head and a loss, ``chunk_size`` positions at a time.

    At most ``[chunk_size, V]`` logits exist at once, and the head's weight is read once: the
    gradients are computed together with the value and only scaled in backward, so ZeRO-3 gathers
    the head a single time for both. Costs three head-sized matmuls, as plain code does, and none
    for positions without loss.

    Args:
        hidden: Last hidden states of the positions, any float type.
        weight: Output head ``[vocab, width]``.
        labels: Target ids, already shifted; ``IGNORE_INDEX`` marks positions without loss.
        loss: A ``TokenLoss``, or any function that is a sum over positions (through autograd).
        bias: Bias of the head, if the model has one.
        trained_rows: Where only some rows of the head are trained: the parameter that holds them
            and their ids. ``weight`` is then a plain tensor and gets no gradient.
        extra: Tensors per position ``[N, ...]`` by name, for a ``TokenLoss`` that needs them; they
            are cut as the positions are.
        chunk_size: Positions per chunk, > 0.
        record: Adds up the sums that lie beside a ``TokenLoss``.

    Returns:
        The summed loss in nats, fp32, differentiable once in ``hidden``, ``weight`` (or the
        parameter in ``trained_rows``) and ``bias``.

    Raises:
        ValueError: ``chunk_size`` is not positive, or a label is outside the vocabulary.
    """
    if chunk_size <= 0:
        raise ValueError(f"chunk_size must be > 0, got {chunk_size}")
    known = isinstance(loss, TokenLoss)
    more = dict(extra or {})
    index = target_rows(labels, weight.shape[0], check=known)
    if index is not None:
        hidden, labels = hidden.index_select(0, index), labels.index_select(0, index)
        more = {name: value.index_select(0, index) for name, value in more.items()}
    grad = torch.is_grad_enabled()
    trained, rows = (weight, None) if trained_rows is None else trained_rows
    wants = (
        grad and hidden.requires_grad,
        grad and trained.requires_grad,
        grad and bias is not None and bias.requires_grad,
    )
    result = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]
        *(hidden, weight.detach(), trained, rows, bias, labels, loss, more, chunk_size, wants),
        record if known else None,
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

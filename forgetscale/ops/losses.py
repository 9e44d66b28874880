"""Token losses: pure functions of logits and labels that return a sum over target positions.

A loss is chosen by ``method.loss.kind``; ``LOSSES`` holds all of them under their kinds, as
functions ``(logits, labels, extra=None, **options) -> sum``. What each one does to a token is in
``forgetscale.ops.gates`` and ``forgetscale.ops.anchors``, how logits are never whole in
``forgetscale.ops.chunked``.

Shape letters: N positions, V vocabulary, K ids per position.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float, Float32, Float64, Int64
from torch import Tensor

from forgetscale.ops import IGNORE_INDEX, anchors, gates
from forgetscale.ops.chunked import (
    LossFunction,
    LossRecord,
    LossSums,
    TokenLoss,
    chunked_loss,
    token_scores,
)
from forgetscale.ops.gates import Form

__all__ = [
    "FORMS",
    "LOSSES",
    "LossFunction",
    "LossRecord",
    "LossSums",
    "TokenLoss",
    "chunked_loss",
    "cross_entropy",
    "entropy_weighted_loss",
    "loss_needs",
    "make_loss",
    "sample_labels",
    "sampled_cross_entropy",
    "token_scores",
    "topk_kl_to_source",
]

FORMS: Mapping[str, Form] = {
    "cross_entropy": Form(gates.cross_entropy, gates=False),
    "eaft": Form(gates.eaft),
    "dft": Form(gates.dft),
    "q_log": Form(gates.q_log),
    "deft": Form(gates.deft),
    "focal": Form(gates.focal),
    "mile": Form(gates.mile),
    "talr": Form(gates.talr),
    "constant_gate": Form(gates.constant_gate),
    "random_gate": Form(gates.random_gate, needs=("noise",)),
    "flow": Form(gates.flow, needs=("sequence_weight",)),
    "iw_sft": Form(gates.iw_sft, needs=("reference_log_prob",)),
    "psft": Form(gates.psft, needs=("old_log_prob",)),
    "kl": Form(anchors.kl, gates=False, needs=anchors.NEEDS),
    "sft_kl": Form(anchors.sft_kl, gates=False, needs=anchors.NEEDS),
    "asft": Form(anchors.asft, needs=anchors.NEEDS),
}
"""Kind -> how its gate is made."""


def loss_needs(kind: str) -> tuple[str, ...]:
    """Return the tensors per position that a kind of loss needs beside logits and labels."""
    return FORMS[kind].needs


def make_loss(
    kind: str, *, normalize: Literal["tokens", "weights"] = "tokens", **options: Any
) -> TokenLoss:
    """Return the loss of a kind.

    Args:
        kind: Key of ``FORMS``.
        normalize: What the step's sum is divided by, see ``TokenLoss``.
        options: Of the kind, see its function in ``gates`` or ``anchors``.

    Raises:
        ValueError: The kind is unknown, or an option is out of range.
    """
    if kind not in FORMS:
        raise ValueError(f"loss must be one of {', '.join(FORMS)}, got {kind!r}")
    form = FORMS[kind]
    return TokenLoss(form.make(**options), normalize, form.gates, form.needs)


cross_entropy = make_loss("cross_entropy")
"""Negative log-likelihood in nats, summed over target positions: see ``TokenLoss.__call__``."""


def entropy_weighted_loss(
    logits: Float[Tensor, "N V"],
    labels: Int64[Tensor, " N"],
    *,
    alpha: float = 1.0,
    top_k: int = 20,
    divisor: Literal["ln_k"] | float = "ln_k",
) -> Float32[Tensor, ""]:
    """Cross-entropy, weighted per token by how unsure the model is (EAFT).

    A token the model is sure about but gets wrong is a conflict with what it knows; its weight,
    the normalised entropy, is near 0. Weights carry no gradient. The maths runs in fp32 whatever
    the dtype of ``logits``.

    Args:
        logits: Raw scores of one chunk of positions.
        labels: Target ids, already shifted; ``IGNORE_INDEX`` marks positions without loss.
        alpha: Power on the weight, no unit, >= 0. 0 gives plain cross-entropy.
        top_k: Number of largest logits used for the entropy; the rest is dropped and the
            distribution renormalised, as in the reference.
        divisor: What the entropy is divided by, in nats: ``ln_k`` or a number > 0.

    Returns:
        Loss in nats, summed over target tokens, fp32. The engine divides it by the number of
        target tokens of the whole step, over all ranks.

    Raises:
        ValueError: ``alpha`` is negative, ``top_k`` is outside 2..vocab, ``divisor`` is not
            positive, or a label is outside the vocabulary.

    Source:
        arXiv:2601.02151, definition of L_EAFT. Differs from the reference code
        (hiyouga/LLaMA-Factory, train/trainer_utils.py), which divides the entropy by 3.0;
        we divide by ln(top_k), 2.996 for 20, so weights are 0.14 % larger at alpha = 1.
    """
    return make_loss("eaft", alpha=alpha, top_k=top_k, divisor=divisor)(logits, labels)


def topk_kl_to_source(
    logits: Float[Tensor, "N V"],
    labels: Int64[Tensor, " N"],
    ids: Int64[Tensor, "N K"],
    logprobs: Float[Tensor, "N K"],
    *,
    direction: Literal["forward", "reverse"] = "forward",
) -> Float32[Tensor, ""]:
    """Divergence from the source model, known by its most likely tokens, over target positions.

    Args:
        logits: Raw scores of one chunk of positions.
        labels: Target ids; only where they are ``IGNORE_INDEX`` matters.
        ids: Tokens of the source model's prediction, different ones in each row.
        logprobs: Their log-probabilities in nats over the whole vocabulary.
        direction: ``forward`` is KL(source || model), ``reverse`` KL(model || source).

    Returns:
        Sum in nats, fp32; see ``forgetscale.ops.anchors`` for what lies outside ``ids``.

    Raises:
        ValueError: An id or a label is outside the vocabulary.
    """
    size = logits.shape[1]
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < size:
        raise ValueError(
            f"source ids must lie in 0..{size - 1}, got {int(ids.min())}..{int(ids.max())}"
        )
    extra = {"source_ids": ids, "source_log_probs": logprobs}
    return make_loss("kl", direction=direction)(logits, labels, extra)


def _pure(kind: str) -> Callable[..., Tensor]:
    def loss(
        logits: Tensor,
        labels: Tensor,
        extra: Mapping[str, Tensor] | None = None,
        **options: Any,
    ) -> Tensor:
        return make_loss(kind, **options)(logits, labels, extra)

    loss.__name__, loss.__doc__ = kind, FORMS[kind].make.__doc__
    return loss


LOSSES: Mapping[str, Callable[..., Tensor]] = {kind: _pure(kind) for kind in FORMS}
"""Kind -> ``(logits [N, V], labels [N], extra=None, **options) -> []``, a sum in nats."""


def uniform_numbers(seed: int, block: int, length: int) -> Float64[Tensor, " length"]:
    """Return one number in [0, 1) per position of a block; a function of the arguments alone.

    Args:
        seed: Seed of the run.
        block: Position of the row in the calibration order.
        length: Positions.
    """
    digest = hashlib.sha256(f"ssu-fisher/{seed}/{block}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
    return torch.rand(length, generator=generator, dtype=torch.float64)


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

"""What a model says at each target token, noted where its logits exist, a few at a time.

Shape letters: N positions, V vocabulary, D model width, M positions with a target, K ids.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from forgetscale.ops.chunked import TILE_ELEMENTS, target_rows
from forgetscale.ops.entropy import topk_entropy

Columns = dict[str, Tensor]
"""``[M, ...]`` by name."""


@dataclass(frozen=True, slots=True)
class Observer:
    """Something to note at each target.

    ``look`` gets log-probabilities ``[N, V]`` of a few positions, fp32 or wider, and their labels;
    it may use the memory of the former. It must take no positions at all.
    """

    look: Callable[[Tensor, Tensor], Columns]


@torch.no_grad()
def observe_tokens(
    hidden: Float[Tensor, "N D"],
    weight: Float[Tensor, "V D"],
    labels: Int64[Tensor, " N"],
    observer: Observer,
    *,
    bias: Float[Tensor, " V"] | None = None,
    chunk_size: int = 1024,
) -> Columns:
    """Return what an observer notes at the positions that have a target, in their order.

    Args:
        hidden: Last hidden states of the positions.
        weight: Output head.
        labels: Target ids; ``IGNORE_INDEX`` marks positions that are passed over.
        observer: What to note.
        bias: Bias of the head, if the model has one.
        chunk_size: Positions whose logits exist at one time, > 0.

    Raises:
        ValueError: A label is outside the vocabulary.
    """
    index = target_rows(labels, weight.shape[0])
    if index is not None:
        hidden, labels = hidden.index_select(0, index), labels.index_select(0, index)
    rows = max(1, TILE_ELEMENTS // weight.shape[0])
    found: list[Columns] = []
    for start in range(0, max(1, hidden.shape[0]), chunk_size):
        part = slice(start, start + chunk_size)
        logits = torch.nn.functional.linear(hidden[part], weight, bias)
        wide = torch.promote_types(logits.dtype, torch.float32)
        for first in range(0, max(1, logits.shape[0]), rows):
            tile = slice(first, first + rows)
            log_probs = torch.log_softmax(logits[tile], -1, dtype=wide)
            found.append(observer.look(log_probs, labels[part][tile]))
    return {name: torch.cat([item[name] for item in found]) for name in found[0]}


def reference_observer(top_k: int) -> Observer:
    """Note what losses need of a reference model.

    ``log_prob`` of the label, the ``top_k`` most likely ``ids`` (int32) with their ``log_probs``,
    and ``log_rest``, the logarithm of what all other tokens have together, summed over themselves.

    Args:
        top_k: Tokens per position, >= 0 and at most the vocabulary.
    """

    def look(log_probs: Tensor, labels: Tensor) -> Columns:
        log_prob = log_probs.gather(1, labels[:, None])[:, 0].clone()
        largest = log_probs.topk(top_k, -1)
        log_rest = log_probs.scatter_(1, largest.indices, -torch.inf).logsumexp(-1)
        return {
            "log_prob": log_prob,
            "ids": largest.indices.to(torch.int32),
            "log_probs": largest.values,
            "log_rest": log_rest,
        }

    return Observer(look)


def landscape_observer(top_k: int) -> Observer:
    """Note where each token lies between conflict and agreement.

    ``log_prob`` of the label, ``entropy`` over the whole vocabulary and ``top_entropy`` over the
    ``top_k`` largest logits (nats), ``gradient``: the norm of ``P - e_y``, and the model's own
    choice ``best`` (int32) with its ``best_log_prob``.

    Args:
        top_k: As in the loss, in 2..V.
    """

    def look(log_probs: Tensor, labels: Tensor) -> Columns:
        log_prob = log_probs.gather(1, labels[:, None])[:, 0].clone()
        top_entropy = topk_entropy(log_probs, top_k)
        largest = log_probs.max(-1)
        best, best_log_prob = largest.indices.to(torch.int32), largest.values
        probs = log_probs.exp_()
        squares = 1 - 2 * log_prob.exp() + probs.square().sum(-1)
        return {
            "log_prob": log_prob,
            "entropy": torch.special.entr(probs).sum(-1),
            "top_entropy": top_entropy,
            "gradient": squares.clamp_min(0).sqrt(),
            "best": best,
            "best_log_prob": best_log_prob,
        }

    return Observer(look)

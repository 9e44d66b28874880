"""How well a fact is known, and how far two models' next tokens are apart.

Shape letters: V and W vocabulary (must be one), K kept tokens; leading dimensions are positions.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

GROUPS = 5
Direction = Literal["tuned_from_source", "source_from_tuned"]
TopOf = Literal["tuned", "source"]


def mastery_group(hits: int, total: int) -> int:
    """Return the mastery group of a fact: 0 never right, else the quarter its hit rate is in.

    Computed in integers: a rate of exactly 1/4, 1/2 or 3/4 belongs to the lower group.

    Args:
        hits: Sampled continuations that hold the answer, 0 to ``total``.
        total: Samples, >= 1 (templates x samples; 210 in the paper).

    Returns:
        0 (no hit), 1 (up to a quarter), 2, 3 or 4 (above three quarters).

    Raises:
        ValueError: The counts are impossible.

    Source:
        arXiv:2509.16596, section 3: groups D0 to D4 of R = hits / total.
    """
    if total < 1 or not 0 <= hits <= total:
        raise ValueError(f"hits must be in 0..total and total >= 1, got {hits} of {total}")
    return -(-4 * hits // total)


def top_ids(logits: Float[Tensor, "*positions V"], k: int) -> Int64[Tensor, "*positions K"]:
    """Return the ids of the ``k`` largest logits, largest first; of equal ones the smaller id.

    Args:
        logits: Scores of one model, no NaN.
        k: Ids per position, 1 to V.
    """
    size = logits.shape[-1]
    if not 1 <= k <= size:
        raise ValueError(f"k must be in 1..{size} (the vocabulary), got {k}")
    rows = logits.reshape(-1, size)
    values, ids = rows.topk(k, dim=-1)
    # topk promises no order of equal values; rows where that matters are sorted in full
    unclear = (rows >= values[:, -1:]).sum(-1) > k
    unclear |= (values[:, 1:] == values[:, :-1]).any(-1)
    if bool(unclear.any()):
        order = rows[unclear].sort(dim=-1, descending=True, stable=True).indices
        ids[unclear] = order[:, :k]
    return ids.reshape(*logits.shape[:-1], k)


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def kl_divergence(
    tuned_logits: Float[Tensor, "*positions K"],
    source_logits: Float[Tensor, "*positions K"],
    direction: Direction = "tuned_from_source",
) -> Float[Tensor, "*positions"]:
    """Return the divergence of two softmaxes over the same tokens, in nats per position.

    Args:
        tuned_logits: Scores of the tuned model.
        source_logits: Scores of the source model for the same tokens.
        direction: ``tuned_from_source`` is KL(tuned || source), the paper's; the other is its
            reverse.
    """
    first, second = _wide(tuned_logits).log_softmax(-1), _wide(source_logits).log_softmax(-1)
    if direction == "source_from_tuned":
        first, second = second, first
    elif direction != "tuned_from_source":
        raise ValueError(
            f"direction must be tuned_from_source or source_from_tuned, got {direction!r}"
        )
    return (first.exp() * (first - second)).sum(-1)


def topk_kl(
    tuned_logits: Float[Tensor, "*positions V"],
    source_logits: Float[Tensor, "*others W"],
    k: int,
    *,
    direction: Direction = "tuned_from_source",
    top_of: TopOf = "tuned",
) -> Float[Tensor, "*positions"]:
    """Return the divergence on the ``k`` likeliest tokens, both models renormalised on them.

    The full divergence is dominated by filler words that tuning suppresses; this one compares
    what both say about one model's candidates.

    Args:
        tuned_logits: Scores of the tuned model, any float type; computed in fp32 (fp64 stays).
        source_logits: Scores of the source model over the same vocabulary.
        k: Tokens kept, 1 to V. V gives the full divergence.
        direction: ``tuned_from_source`` is KL(tuned || source), the paper's.
        top_of: Whose ``k`` largest logits choose the tokens (the paper: the tuned model's).

    Returns:
        Nats per position.

    Raises:
        ValueError: The shapes differ, or ``k`` is out of range.

    Source:
        arXiv:2509.16596, section 4. Of equal logits the smaller id is kept (not stated there).
    """
    if tuned_logits.shape != source_logits.shape:
        raise ValueError(
            f"both models need the same positions and vocabulary, got {list(tuned_logits.shape)}"
            f" and {list(source_logits.shape)}"
        )
    if top_of not in ("tuned", "source"):
        raise ValueError(f"top_of must be tuned or source, got {top_of!r}")
    ids = top_ids(tuned_logits if top_of == "tuned" else source_logits, k)
    return kl_divergence(tuned_logits.gather(-1, ids), source_logits.gather(-1, ids), direction)


def top_mass(
    logits: Float[Tensor, "*positions V"], ids: Int64[Tensor, "*positions K"]
) -> Float[Tensor, "*positions"]:
    """Return the share of the full softmax that falls on ``ids``: what ``topk_kl`` looks at."""
    wide = _wide(logits)
    return (wide.gather(-1, ids).logsumexp(-1) - wide.logsumexp(-1)).exp()

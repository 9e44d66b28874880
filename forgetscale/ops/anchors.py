"""Losses that keep the prediction close to a source model's, known by its most likely tokens.

The source model's distribution comes as ``source_ids [N, K]`` (distinct ids) and
``source_log_probs [N, K]`` (their log-probabilities over the whole vocabulary) with every position;
what they leave of the probability is one outcome, "any other token". The divergence over these
``K + 1`` outcomes is a lower bound of the true one, exact at ``K = V``, and among tokens outside
the ``K`` it pulls nowhere: they keep their proportions to each other.

How much is left comes as ``source_log_rest [N]``, the logarithm of what the other tokens have
together, summed over themselves; the ``K + 1`` numbers are then divided by their sum, which undoes
the rounding they were stored with. Without it the rest is ``1 - sum Q``, and a rest below
``REST_NOISE`` counts as none, because it is all rounding.

Shape letters: N positions, V vocabulary, K ids per position.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from forgetscale.ops.gates import Anchor, Gate, TokenStats, TokenTerms

PER_ID = ("source_ids", "source_log_probs")
"""Tensors with ``K`` numbers per position."""
NEEDS = (*PER_ID, "source_log_rest")
"""What the engine hands to these losses."""
Direction = Literal["forward", "reverse"]
REST_NOISE = 1e-6
"""A rest of the source's probability below this is rounding of its log-probabilities."""
MAX_LOG_RATIO = 60.0
"""Keeps the pull on a rest that the model all but excludes within fp32."""


def kl_terms(stats: TokenStats, direction: Direction) -> tuple[Float[Tensor, " N"], Anchor]:
    """Return the divergence of each position in nats, and its gradient.

    Args:
        stats: Positions, with ``source_ids``, ``source_log_probs`` and, if known,
            ``source_log_rest``.
        direction: ``forward`` is KL(source || model), ``reverse`` KL(model || source).

    Raises:
        ValueError: The first two tensors are missing.
    """
    ids = stats.extra("source_ids").long()
    log_q, log_rest_q, known = _source_of(stats)
    q, log_p = log_q.exp(), stats.log_probs.gather(1, ids)
    p = log_p.exp()
    # Summed over the other tokens themselves: 1 - sum(p) is all rounding where the model is sure.
    log_rest_p = torch.logsumexp(stats.log_probs.scatter(1, ids, -torch.inf), -1)
    rest_q = torch.where(known, log_rest_q.exp(), 0.0)
    if direction == "forward":
        rest = torch.where(known, rest_q * (log_rest_q - log_rest_p), 0.0)
        value = _times(q, log_q - log_p).sum(-1) + rest
        # The rest of Q is spread as the model spreads its own.
        ratio = torch.where(known, log_rest_q - log_rest_p, -torch.inf)
        return value, Anchor(1 - ratio.clamp_max(MAX_LOG_RATIO).exp(), ids=ids, put=p - q)
    # A model that leaves the source's tokens where nothing is left would diverge without end.
    log_rest_q = torch.where(known, log_rest_q, math.log(REST_NOISE))
    rest_ratio = torch.where(log_rest_p > -torch.inf, log_rest_p - log_rest_q, 0.0)
    value = _times(p, log_p - log_q).sum(-1) + log_rest_p.exp() * rest_ratio
    put = _times(p, log_p - log_q - value[:, None])
    return value, Anchor(rest_ratio - value, ids=ids, put=put)


def _source_of(stats: TokenStats) -> tuple[Tensor, Tensor, Tensor]:
    """Return the source's log-probabilities, that of its rest (0 if none), and if there is one."""
    log_q = stats.extra("source_log_probs").to(stats.log_probs.dtype)
    given = stats.optional("source_log_rest")
    if given is None:
        rest = 1 - log_q.exp().sum(-1)
        known = rest > REST_NOISE
        return log_q, torch.where(known, rest, 1.0).log(), known
    given = given.to(log_q)
    known = given > -torch.inf
    whole = torch.logsumexp(torch.cat([log_q, given[:, None]], 1), -1)
    return log_q - whole[:, None], torch.where(known, given - whole, 0.0), known


def _times(factor: Tensor, value: Tensor) -> Tensor:
    """Return the product, 0 where the factor is 0 whatever the value."""
    return torch.where(factor > 0, factor * value, 0.0)


def kl(*, direction: Direction = "forward") -> Gate:
    """Return the gate of the divergence alone.

    Args:
        direction: See ``kl_terms``.
    """

    def gate(stats: TokenStats) -> TokenTerms:
        value, anchor = kl_terms(stats, direction)
        return TokenTerms(value, torch.zeros_like(value), torch.ones_like(value), anchor)

    return gate


def _anchored(stats: TokenStats, weight: Tensor, factor: float, direction: Direction) -> TokenTerms:
    value, anchor = kl_terms(stats, direction)
    assert anchor.put is not None
    scaled = Anchor(factor * anchor.mass, ids=anchor.ids, put=factor * anchor.put)
    return TokenTerms(factor * value - weight * stats.log_prob, weight, weight, scaled)


def sft_kl(*, factor: float, direction: Direction = "forward") -> Gate:
    """Return cross-entropy plus ``factor`` times the divergence from the source model.

    Args:
        factor: >= 0.
        direction: See ``kl_terms``.
    """
    if factor < 0:
        raise ValueError(f"factor must be >= 0, got {factor}")
    return lambda stats: _anchored(stats, torch.ones_like(stats.log_prob), factor, direction)


def asft(*, factor: float = 0.05, direction: Direction = "forward") -> Gate:
    """Return cross-entropy times the label's probability, plus ``factor`` times the divergence.

    Args:
        factor: >= 0.
        direction: See ``kl_terms``.

    Source:
        arXiv:2509.23753; the divergence there is over the whole vocabulary of the base model.
    """
    if factor < 0:
        raise ValueError(f"factor must be >= 0, got {factor}")
    return lambda stats: _anchored(stats, stats.log_prob.exp(), factor, direction)

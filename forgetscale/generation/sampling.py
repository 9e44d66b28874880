"""Drawing tokens with noise that depends on seed, position and token alone.

Gumbel-max: the token with the largest ``log p + G(seed, position, token)`` has the probability
``p``. Each ``G`` comes from a hash of its three keys, so no generator has a state, and a row's
token depends on that row's logits and keys only. The restricted distribution is exact: temperature
first, then the ``top_k`` most probable tokens, then the smallest prefix of them with at least
``top_p`` of their probability; of equal logits the lower id comes first.

Shape letters: R rows, V vocabulary, K candidates.

Source: S. Vigna's splitmix64 (2015) as the hash; E. J. Gumbel (1954) for the maximum.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed number
_FIRST = -4658895280553007687  # 0xBF58476D1CE4E5B9
_SECOND = -7723592293110705685  # 0x94D049BB133111EB
_CANDIDATES = 64
"""Tokens looked at first; enough for all but flat distributions."""


@dataclass(frozen=True, slots=True)
class RowSampling:
    """How the token of each row is drawn.

    Attributes:
        seeds: Seed of each row.
        positions: Position of the new token in its dialogue.
        temperature: >= 0; 0 takes the most probable token.
        top_p: In (0, 1].
        top_k: >= 0; 0: no limit.
    """

    seeds: Int64[Tensor, " R"]
    positions: Int64[Tensor, " R"]
    temperature: Float64[Tensor, " R"]
    top_p: Float64[Tensor, " R"]
    top_k: Int64[Tensor, " R"]


def _shift(value: Tensor, bits: int) -> Tensor:
    """Return the unsigned shift to the right of signed 64-bit numbers."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def mix(value: Int64[Tensor, "*shape"]) -> Int64[Tensor, "*shape"]:
    """Return the splitmix64 finaliser of each number; products wrap."""
    value = (value ^ _shift(value, 30)) * _FIRST
    value = (value ^ _shift(value, 27)) * _SECOND
    return value ^ _shift(value, 31)


def gumbel_noise(
    seeds: Int64[Tensor, " R"], positions: Int64[Tensor, " R"], tokens: Int64[Tensor, "R K"]
) -> Float64[Tensor, "R K"]:
    """Return standard Gumbel noise for every row and token.

    Args:
        seeds: Seed of each row.
        positions: Position of the new token of each row.
        tokens: Token ids that noise is wanted for.
    """
    rows = mix(mix(seeds + _GOLDEN) ^ (positions * _GOLDEN))
    bits = mix(mix(rows[:, None] + (tokens + 1) * _GOLDEN))
    uniform = (_shift(bits, 11).to(torch.float64) + 0.5) * 2.0**-53
    return -torch.log(-torch.log(uniform))


def draw_tokens(
    logits: Float[Tensor, "R V"], rows: RowSampling
) -> tuple[Int64[Tensor, " R"], Float64[Tensor, "R V"]]:
    """Draw one token for each row.

    Args:
        logits: Raw scores of the next token; finite.
        rows: How each row is drawn.

    Returns:
        Token ids, and the log-probabilities at temperature 1 without restriction.
    """
    wide = logits.to(torch.float64)
    log_probs = wide - torch.logsumexp(wide, dim=1, keepdim=True)
    greedy = rows.temperature == 0
    scaled = wide / torch.where(greedy, 1.0, rows.temperature)[:, None]
    scaled = scaled - torch.logsumexp(scaled, dim=1, keepdim=True)
    tokens = torch.argmax(scaled, dim=1)
    is_restricted = (rows.top_p < 1) | (rows.top_k > 0)
    for restricted in (False, True):
        chosen = torch.nonzero((is_restricted == restricted) & ~greedy).flatten()
        if not len(chosen):
            continue
        part = _chosen(rows, chosen)
        if restricted:
            tokens[chosen] = _draw_restricted(scaled[chosen], part)
        else:
            every = torch.arange(scaled.shape[1], device=scaled.device).expand(len(chosen), -1)
            noise = gumbel_noise(part.seeds, part.positions, every)
            tokens[chosen] = torch.argmax(scaled[chosen] + noise, dim=1)
    return tokens, log_probs


def _draw_restricted(scaled: Float64[Tensor, "R V"], rows: RowSampling) -> Int64[Tensor, " R"]:
    """Draw from the restricted distribution of normalised log-probabilities.

    Sorting the vocabulary is not needed: a few candidates hold the mass of most rows, and flat
    rows are drawn by rejection, which gives the same token.
    """
    size = scaled.shape[1]
    # Only a limit on the number of tokens beyond the candidates needs an order of all.
    count = size if bool((rows.top_k > _CANDIDATES).any()) else min(size, _CANDIDATES)
    values, ids = _ordered(scaled, count)
    keep = kept_candidates(values, rows.top_p, rows.top_k)
    scores = values + gumbel_noise(rows.seeds, rows.positions, ids)
    best = torch.argmax(torch.where(keep, scores, -torch.inf), dim=1, keepdim=True)
    tokens = ids.gather(1, best)[:, 0]
    left = torch.nonzero(~_is_enough(values, rows)).flatten() if count < size else rows.seeds[:0]
    if len(left):
        tokens[left] = _draw_by_rejection(scaled[left], _chosen(rows, left))
    return tokens


def _draw_by_rejection(scaled: Float64[Tensor, "R V"], rows: RowSampling) -> Int64[Tensor, " R"]:
    """Draw where many tokens may be drawn: the best of all scores that belongs to the set.

    A token belongs to the set if what is more probable has less than ``top_p`` together.
    """
    every = torch.arange(scaled.shape[1], device=scaled.device)
    wide = every.expand(len(scaled), -1)
    scores = scaled + gumbel_noise(rows.seeds, rows.positions, wide)
    tokens = torch.zeros_like(rows.seeds)
    left = torch.arange(len(tokens), device=tokens.device)
    while len(left):
        part = scaled[left]
        best = torch.argmax(scores[left], dim=1, keepdim=True)
        value = part.gather(1, best)
        ahead = (part > value) | ((part == value) & (every < best))
        belongs = torch.where(ahead, part.exp(), 0.0).sum(1) < rows.top_p[left]
        tokens[left[belongs]] = best[belongs, 0]
        left, best = left[~belongs], best[~belongs]
        scores[left, best[:, 0]] = -torch.inf
    return tokens


def _chosen(rows: RowSampling, places: Int64[Tensor, " C"]) -> RowSampling:
    """Return how some of the rows are drawn."""
    return RowSampling(
        rows.seeds[places],
        rows.positions[places],
        rows.temperature[places],
        rows.top_p[places],
        rows.top_k[places],
    )


def _ordered(
    scaled: Float64[Tensor, "R V"], count: int
) -> tuple[Float64[Tensor, "R K"], Int64[Tensor, "R K"]]:
    """Return the ``count`` most probable tokens, most probable first, then by id."""
    ids = torch.topk(scaled, count, dim=1).indices.sort(dim=1).values
    values, order = torch.sort(scaled.gather(1, ids), dim=1, descending=True, stable=True)
    return values, ids.gather(1, order)


def _is_enough(values: Float64[Tensor, "R K"], rows: RowSampling) -> Bool[Tensor, " R"]:
    """Return whether the candidates hold every token that may be drawn."""
    by_count = (rows.top_k > 0) & (rows.top_k <= values.shape[1])
    return by_count | (values.exp().sum(1) >= rows.top_p)


def kept_candidates(
    values: Float64[Tensor, "R K"], top_p: Float64[Tensor, " R"], top_k: Int64[Tensor, " R"]
) -> Bool[Tensor, "R K"]:
    """Return which candidates may be drawn; the first one always may.

    Args:
        values: Log-probabilities, most probable first.
        top_p: In (0, 1].
        top_k: >= 0; 0: no limit.
    """
    ranks = torch.arange(values.shape[1], device=values.device)
    within = (top_k[:, None] == 0) | (ranks < top_k[:, None])
    mass = torch.where(within, values.exp(), 0.0)
    whole = torch.where(top_k > 0, mass.sum(1), 1.0)[:, None]
    before = torch.cumsum(mass, dim=1) - mass
    keep = within & (before < top_p[:, None] * whole)
    keep[:, 0] = True
    return keep

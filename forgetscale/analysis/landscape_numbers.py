"""Numbers of the entropy-probability landscape: where tokens lie, what they weigh, who fights.

Four quadrants, by the probability of the target ``p`` and the entropy of the prediction ``H``:
*conflict* (the model is sure of something else: both low), *mastered* (sure, and not of something
else), *uncertain* (target unlikely, nothing sure), *open* (target likely among others).

Shape letters: M targets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

QUADRANTS = ("conflict", "mastered", "uncertain", "open")
SURE_ENTROPY, UNLIKELY = 0.5, 0.1
"""Borders in nats and in probability; the former is the paper's "low" entropy (figure 4)."""
HIGH_ENTROPY = 2.0
PILOT_SHARE = 0.15
ENVELOPE_TOLERANCE = 2e-3
PROBABILITY_BINS, ENTROPY_BINS = 40, 40
Tokens = Mapping[str, np.ndarray]
"""``[M]`` by name: ``log_prob``, ``entropy``, ``gate``, ``gradient`` (norm of ``P - e_y``)."""


@dataclass(frozen=True, slots=True)
class Borders:
    """Where quadrants meet."""

    entropy: float = SURE_ENTROPY
    """Nats; below or at it the model is sure."""
    probability: float = UNLIKELY
    """Below or at it the target is unlikely."""


def quadrant_of(tokens: Tokens, borders: Borders) -> Int[np.ndarray, " M"]:
    """Return the number of each token's quadrant in ``QUADRANTS``."""
    sure = tokens["entropy"] <= borders.entropy
    unlikely = tokens["log_prob"] <= np.log(borders.probability)
    return np.where(sure, np.where(unlikely, 0, 1), np.where(unlikely, 2, 3))


def conflict_of(tokens: Tokens, borders: Borders) -> Float[np.ndarray, " M"]:
    """Return what the gate takes of each conflicting token's loss, in nats; 0 elsewhere."""
    muted = -(1 - np.minimum(tokens["gate"], 1.0)) * tokens["log_prob"]
    return np.where(quadrant_of(tokens, borders) == 0, muted, 0.0)


def outside_envelope(tokens: Tokens, vocab_size: int) -> Bool[np.ndarray, " M"]:
    """Return which tokens lie where no distribution can: there should be none.

    The entropy is at least that of the target against all other tokens together, and at most what
    is reached when all others are equally likely.

    Args:
        tokens: The tokens.
        vocab_size: Tokens in the vocabulary.
    """
    low, high = envelope(np.exp(tokens["log_prob"]), vocab_size)
    off = ENVELOPE_TOLERANCE
    found: np.ndarray = (tokens["entropy"] < low - off) | (tokens["entropy"] > high + off)
    return found


def envelope(
    p: Float[np.ndarray, " M"], vocab_size: int
) -> tuple[Float[np.ndarray, " M"], Float[np.ndarray, " M"]]:
    """Return the least and the largest entropy (nats) for a probability of the target.

    Args:
        p: Probabilities, in [0, 1].
        vocab_size: Tokens in the vocabulary, > 2.
    """
    q = 1 - np.asarray(p, np.float64)
    tiny = np.finfo(np.float64).tiny
    low = -(p * np.log(np.maximum(p, tiny)) + q * np.log(np.maximum(q, tiny)))
    return low, low + q * np.log(vocab_size - 1)


def summary(tokens: Tokens, borders: Borders, vocab_size: int) -> dict[str, Any]:
    """Return the numbers of one model.

    Args:
        tokens: At least one token.
        borders: Where quadrants meet.
        vocab_size: Tokens in the vocabulary.
    """
    quadrant = quadrant_of(tokens, borders)
    loss, gate = -tokens["log_prob"], tokens["gate"]
    masses = {
        "tokens": np.ones_like(loss),
        "loss": loss,
        "gradient": tokens["gradient"],
        "gated_loss": gate * loss,
        "gated_gradient": gate * tokens["gradient"],
    }
    shares = {name: _shares(mass, quadrant) for name, mass in masses.items()}
    quadrants: dict[str, dict[str, float | None]] = {
        name: {
            "mean_gate": _mean(gate[quadrant == index]),
            **{mass: share[index] for mass, share in shares.items()},
        }
        for index, name in enumerate(QUADRANTS)
    }
    return {
        "num_tokens": len(loss),
        "mean_gate": float(gate.mean()),
        "cross_entropy": float(loss.mean()),
        "gated_cross_entropy": float((gate * loss).mean()),
        "mean_entropy": float(tokens["entropy"].mean()),
        "high_entropy_share": float((tokens["entropy"] >= HIGH_ENTROPY).mean()),
        "quadrants": quadrants,
        "pilot_mask": _pilot(tokens),
        "outside_envelope": int(outside_envelope(tokens, vocab_size).sum()),
        "histogram": histogram(tokens, vocab_size),
    }


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def _shares(mass: np.ndarray, quadrant: np.ndarray) -> list[float]:
    sums = np.bincount(quadrant, weights=mass.astype(np.float64), minlength=len(QUADRANTS))
    return [float(value) for value in sums / max(sums.sum(), np.finfo(np.float64).tiny)]


def _pilot(tokens: Tokens) -> dict[str, float]:
    """Return what the paper's pilot would mask: the lowest 15 % in entropy and in probability.

    The paper does not say over which tokens it ranks; these are all targets that were looked at.
    """
    entropy, log_prob = tokens["entropy"], tokens["log_prob"]
    low, unlikely = np.quantile(entropy, PILOT_SHARE), np.quantile(log_prob, PILOT_SHARE)
    return {
        "entropy": float(low),
        "probability": float(np.exp(unlikely)),
        "share": float(((entropy <= low) & (log_prob <= unlikely)).mean()),
    }


def histogram(tokens: Tokens, vocab_size: int) -> dict[str, Any]:
    """Return counts ``[probability, entropy]`` over bins of equal width.

    Args:
        tokens: The tokens.
        vocab_size: Tokens in the vocabulary, which bounds the entropy.
    """
    top = min(np.log(vocab_size), max(1.0, np.ceil(2 * float(tokens["entropy"].max())) / 2))
    x = np.linspace(0.0, 1.0, PROBABILITY_BINS + 1)
    y = np.linspace(0.0, top, ENTROPY_BINS + 1)
    p = np.clip(np.exp(tokens["log_prob"]), 0, 1)
    counts, _, _ = np.histogram2d(p, np.clip(tokens["entropy"], 0, top), bins=(x, y))
    return {
        "probability_edges": x.tolist(),
        "entropy_edges": y.tolist(),
        "counts": counts.astype(int).tolist(),
    }


def transitions(before: Tokens, after: Tokens, borders: Borders) -> list[list[int]]:
    """Return how many tokens went from each quadrant (rows) to each (columns).

    Args:
        before: Tokens under one model.
        after: The same tokens under another.
        borders: Where quadrants meet.
    """
    size = len(QUADRANTS)
    code = quadrant_of(before, borders) * size + quadrant_of(after, borders)
    counts: list[list[int]] = np.bincount(code, minlength=size**2).reshape(size, size).tolist()
    return counts


def by_group(
    tokens: Tokens, group: Int[np.ndarray, " M"], count: int, borders: Borders
) -> list[dict[str, float]]:
    """Return numbers of each group of tokens: of a source file, or of one text.

    Args:
        tokens: The tokens.
        group: Number of each token's group.
        count: Groups.
        borders: Where quadrants meet.
    """
    sizes = np.bincount(group, minlength=count)

    def total(values: np.ndarray) -> np.ndarray:
        found: np.ndarray = np.bincount(group, weights=values.astype(np.float64), minlength=count)
        return found

    conflict = total(quadrant_of(tokens, borders) == 0)
    nats, gate = total(conflict_of(tokens, borders)), total(tokens["gate"])
    loss, pull = total(-tokens["log_prob"]), total(tokens["gradient"])
    return [
        {
            "tokens": int(sizes[index]),
            "conflicts": int(conflict[index]),
            "conflict_nats": float(nats[index]),
            "mean_gate": float(gate[index] / max(1, sizes[index])),
            "cross_entropy": float(loss[index] / max(1, sizes[index])),
            "gradient": float(pull[index]),
        }
        for index in range(count)
    ]

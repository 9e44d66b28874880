"""Entropy of next-token predictions from their largest logits.

Shape letters: N positions, V vocabulary, K largest logits kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

BLOCK = 32
"""Neighbouring logits of which the maximum is taken first when the largest are looked for."""


def topk_logits(logits: Float[Tensor, "N V"], k: int) -> Float[Tensor, "N K"]:
    """Return the ``k`` largest values of each row, largest first; exact, ties included.

    The ``k`` blocks with the largest maxima hold ``k`` values that no value outside them exceeds.
    Selecting blocks, then values inside them, reads each logit once and sorts a few hundred; a
    plain ``topk`` over a vocabulary of 150,000 takes three to four times as long.

    Args:
        logits: Scores, any float type.
        k: How many, in 1..V.

    Raises:
        ValueError: ``k`` is outside 1..V.
    """
    num_rows, size = logits.shape
    if not 1 <= k <= size:
        raise ValueError(f"k must lie in 1..vocab ({size}), got {k}")
    whole = size // BLOCK * BLOCK
    if whole // BLOCK <= 2 * k:
        return logits.topk(k, -1).values
    blocks = logits[:, :whole].view(num_rows, -1, BLOCK)
    best = blocks.amax(-1).topk(k, -1, sorted=False).indices
    found = blocks.gather(1, best[:, :, None].expand(-1, -1, BLOCK)).flatten(1)
    return torch.cat([found, logits[:, whole:]], 1).topk(k, -1).values


def merge_topk(parts: Sequence[Float[Tensor, "N _"]], k: int) -> Float[Tensor, "N K"]:
    """Return the ``k`` largest of a row from the largest of each part of its vocabulary.

    For a vocabulary cut over ranks: each takes ``topk_logits`` of its share (all of it where the
    share holds fewer than ``k``), the parts are gathered, ``k`` values per rank and position, and
    this selects again. The result equals the selection over the whole row.

    Args:
        parts: Largest values of each share.
        k: How many, > 0 and at most the number of values in all parts.

    Raises:
        ValueError: The parts hold fewer than ``k`` values.
    """
    together = torch.cat(list(parts), 1)
    if not 1 <= k <= together.shape[1]:
        raise ValueError(f"k must lie in 1..{together.shape[1]}, the values given, got {k}")
    return together.topk(k, -1).values


def entropy_of(largest: Float[Tensor, "N K"]) -> Float[Tensor, " N"]:
    """Return the entropy in nats of a softmax over exactly these logits, in 0..ln K.

    Args:
        largest: Logits, any float type; computed in fp32 or wider. ``-inf`` counts as impossible.
    """
    wide = torch.promote_types(largest.dtype, torch.float32)
    found: Tensor = torch.special.entr(torch.softmax(largest, -1, dtype=wide)).sum(-1)
    return found


def topk_entropy(logits: Float[Tensor, "N V"], k: int) -> Float[Tensor, " N"]:
    """Return the entropy in nats of the prediction renormalised over its ``k`` largest logits.

    Between 0 and ``ln k``; with ``k`` the whole vocabulary it is the entropy proper. Adding a
    constant to a row changes nothing. The maths runs in fp32 or wider whatever the input's type.

    Args:
        logits: Raw scores of positions.
        k: Number of largest logits, in 2..V (one alone has no entropy).

    Raises:
        ValueError: ``k`` is outside 2..V.

    Source:
        arXiv:2601.02151, section 4, with the renormalisation of its code (hiyouga/LLaMA-Factory,
        ``_eaft_cross_entropy``); rows with fewer than ``k`` finite logits give NaN there.
    """
    if not 2 <= k <= logits.shape[-1]:
        raise ValueError(f"top_k must lie in 2..vocab ({logits.shape[-1]}), got {k}")
    return entropy_of(topk_logits(logits, k))

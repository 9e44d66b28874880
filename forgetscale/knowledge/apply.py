"""Put a block of the edited model together.

Shape letters: S elements of a block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from forgetscale.knowledge.blocks import Block, dropped, probabilities, wide_type
from forgetscale.knowledge.edits import Variant

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(values: Tensor) -> Tensor:
    """Return float values as integers of the same size, so that copies keep every bit."""
    return values.view(_BITS[values.element_size()])


def elect_and_average(changes: Sequence[Tensor]) -> Tensor:
    """Return, per element, the mean of the changes whose sign is that of their sum; else 0.

    Args:
        changes: ``[S]`` trimmed change of each tuned model; 0 does not vote.

    Source:
        TIES-Merging (arXiv:2306.01708), disjoint mean. Where the sum is 0 there is no winner and
        nothing is kept; the official code takes the sign that most elements have.
    """
    stacked = torch.stack(list(changes))
    sign = stacked.sum(0).sign()
    agrees = (stacked.sign() == sign) & (sign != 0)
    count = agrees.sum(0).clamp(min=1)
    return torch.where(agrees, stacked, 0.0).sum(0) / count


def edited_block(
    variant: Variant, block: Block, taken: Mapping[int, Tensor], scales: Mapping[str, float]
) -> tuple[Tensor, int]:
    """Return the edited values of a block, in the tuned model's type, and how many were dropped.

    Args:
        variant: What to write.
        block: The block in all models.
        taken: What each cut takes of it.
        scales: ``MODEL/KEY`` -> scale of the tensor's changes, where it was measured; ``match``
            -> the variant's common scale.
    """
    drops = [dropped(drop, block, m, taken) for m, drop in enumerate(variant.drops)]
    count = sum(int(mask.sum()) for mask in drops if mask is not None)
    out = block.tuned(0).dtype
    source = block.source.to(out)
    factors: list[float | Tensor] = []
    for model, (drop, weight) in enumerate(zip(variant.drops, variant.weights, strict=True)):
        factor: float | Tensor = weight * scales.get("match", 1.0)
        factor = factor * scales.get(f"{model}/{block.entry.key}", 1.0)
        if variant.rescale == "inverse":
            factor = factor / (1 - probabilities(drop, block, model))
            if drop.kind not in ("draw", "draw_ranked"):
                factor = weight / (1 - float(variant.dropped))
        factors.append(factor)
    if len(factors) == 1 and isinstance(factors[0], float) and factors[0] in (0.0, 1.0):
        kept = block.tuned(0) if factors[0] else source
        if drops[0] is None:
            return kept, count
        return torch.where(drops[0], bits(source), bits(kept)).view(out), count
    return _computed(variant, block, drops, factors), count


def _computed(
    variant: Variant,
    block: Block,
    drops: Sequence[Tensor | None],
    factors: Sequence[float | Tensor],
) -> Tensor:
    changes = []
    for model, mask in enumerate(drops):
        change = block.delta(model)
        changes.append(change if mask is None else torch.where(mask, 0.0, change))
    out = block.tuned(0).dtype
    if variant.elect:
        # One lambda for the merged change; weights of single models enter before the vote.
        base = variant.weights[0] or 1.0
        votes = [c * (f / base) for c, f in zip(changes, factors, strict=True)]
        total = elect_and_average(votes) * base
    else:
        scaled = [c * f for c, f in zip(changes, factors, strict=True)]
        total = torch.stack(scaled).sum(0)
    wide = wide_type(block.source.dtype, out)
    edited = (block.source.to(wide) + total.to(wide)).to(out)
    return torch.where(total == 0, bits(block.source.to(out)), bits(edited)).view(out)

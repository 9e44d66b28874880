"""What a recipe will need: bytes per rank and floating-point operations per token."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from forgetscale.config import Recipe
from forgetscale.masks import FreezePlan

_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes on one rank that stand for the whole run; activations come on top."""

    weights: int
    """Working copy of this rank's slices."""
    master_weights: int
    """fp32 masters of trained slices."""
    moments: int
    """AdamW's two fp32 moments of trained slices."""
    gradients: int
    """Accumulation buffer of trained slices."""
    step_gradients: int
    """fp32 copy of the gradients while the optimizer steps."""
    logits: int
    """Logits of one chunk and their gradient."""

    @property
    def total(self) -> int:
        """Sum of the parts."""
        return (
            self.weights
            + self.master_weights
            + self.moments
            + self.gradients
            + self.step_gradients
            + self.logits
        )


def estimate_memory(
    recipe: Recipe,
    shapes: Mapping[str, tuple[int, ...]],
    vocab_size: int,
    world_size: int,
    plan: FreezePlan | None = None,
) -> MemoryEstimate:
    """Estimate the lasting memory of one rank in the masked layout.

    Args:
        recipe: Resolved recipe.
        shapes: Parameter shapes of the model.
        vocab_size: Rows of the output head.
        world_size: Number of ranks.
        plan: Freeze plan; whole frozen parameters carry no state, frozen columns still do.
    """
    whole = frozenset() if plan is None else plan.whole
    slices = {name: -(-math.prod(shape) // world_size) for name, shape in shapes.items()}
    held = sum(slices.values())
    trained = sum(size for name, size in slices.items() if name not in whole)
    width = _BYTES[recipe.model.dtype]
    accumulation = 4 if width == 4 else _BYTES[recipe.train.accumulation_dtype]
    return MemoryEstimate(
        weights=width * held,
        master_weights=4 * trained,
        moments=8 * trained,
        gradients=accumulation * trained,
        step_gradients=4 * trained,
        logits=recipe.train.loss_chunk_size * vocab_size * (4 + 4 + width),
    )


def flops_per_token(
    shapes: Mapping[str, tuple[int, ...]], embedding: str, layers: int, hidden: int, block: int
) -> int:
    """Return forward and backward floating-point operations per token, without recomputation.

    Six per weight of every matrix that is multiplied (the input embedding is looked up), plus
    ``12 * layers * hidden * block / 2`` of causal attention.
    """
    multiplied = sum(
        math.prod(shape) for name, shape in shapes.items() if len(shape) == 2 and name != embedding
    )
    return 6 * multiplied + 6 * layers * hidden * block

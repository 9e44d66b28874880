"""What a recipe will need: bytes per rank and floating-point operations per token."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from forgetscale.config import Recipe
from forgetscale.config.deepspeed import read_deepspeed

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
    """fp32 copy of one sub-group's gradients while the optimizer steps."""
    logits: int
    """Logits of one chunk and their gradient, and the fp32 gradient of the output head."""
    offloaded: bool
    """True if masters, moments and the step's gradients live in host memory."""

    @property
    def host(self) -> int:
        """Bytes in host memory through offload."""
        return self.master_weights + self.moments + self.step_gradients if self.offloaded else 0

    @property
    def device(self) -> int:
        """Bytes where the model computes."""
        parts = (self.weights, self.master_weights, self.moments, self.gradients)
        return sum(parts) + self.step_gradients + self.logits - self.host


def estimate_memory(
    recipe: Recipe,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    vocab_size: int,
    hidden_size: int,
    world_size: int,
    frozen_whole: frozenset[str] = frozenset(),
) -> MemoryEstimate:
    """Estimate the lasting memory of one rank in the masked layout.

    Args:
        recipe: Resolved recipe.
        shapes: Parameter shapes of the model.
        vocab_size: Rows of the output head.
        hidden_size: Columns of the output head.
        world_size: Number of ranks.
        frozen_whole: Parameters that are frozen whole and carry no state; frozen columns do.
    """
    slices = {name: -(-math.prod(shape) // world_size) for name, shape in shapes.items()}
    held = sum(slices.values())
    trained = sum(size for name, size in slices.items() if name not in frozen_whole)
    width = _BYTES[recipe.model.dtype]
    zero = read_deepspeed(recipe.deepspeed)["zero_optimization"]
    offloaded = zero.get("offload_optimizer", {}).get("device") == "cpu"
    group = trained if offloaded else min(trained, int(zero.get("sub_group_size", 1e9)))
    accumulation = 4 if width == 4 else _BYTES[recipe.train.accumulation_dtype]
    return MemoryEstimate(
        weights=width * held,
        master_weights=4 * trained,
        moments=8 * trained,
        gradients=accumulation * trained,
        step_gradients=4 * group,
        logits=vocab_size * (recipe.train.loss_chunk_size * (4 + 4 + width) + 4 * hidden_size),
        offloaded=offloaded,
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

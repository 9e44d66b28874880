"""Bytes of one rank that last from step to step: known from shapes and the plan's layout alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from forgetscale.config import Recipe
from forgetscale.config.deepspeed import read_deepspeed
from forgetscale.masks import CompactLayout

DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
NUM_STATES = 3
"""fp32 values of a trained element that a checkpoint holds: the master and two moments."""
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class StateBytes:
    """Bytes that stand for the whole run on one rank; names as in ``ZeroShards.state_bytes``."""

    weights: int
    """Working copy of this rank's slices, frozen ones too."""
    masters: int
    """fp32 masters of trained slices."""
    moments: int
    """AdamW's two fp32 moments of trained slices."""
    gradients: int
    """Accumulation buffer of trained slices."""
    step_gradients: int
    """fp32 gradients the optimizer steps with: lasting with offload, else 0 here."""
    offloaded: bool
    """True if everything but the weights lives in host memory."""

    @property
    def host(self) -> int:
        """Bytes in host memory through offload."""
        if not self.offloaded:
            return 0
        return self.masters + self.moments + self.gradients + self.step_gradients

    @property
    def device(self) -> int:
        """Bytes where the model computes."""
        kept = self.masters + self.moments + self.gradients + self.step_gradients
        return self.weights + (0 if self.offloaded else kept)

    def measured_parts(self) -> dict[str, int]:
        """Return the parts that ``ZeroShards.state_bytes`` measures."""
        names = ("weights", "masters", "moments", "gradients")
        return {name: asdict(self)[name] for name in names}


def built_shapes(shapes: Shapes, layout: CompactLayout | None) -> dict[str, tuple[int, ...]]:
    """Return the parameter shapes of the built model: matrices cut in two parts, factors.

    Args:
        shapes: Parameter shapes of the source model.
        layout: How the plan is stored, or None.
    """
    if layout is None:
        return dict(shapes)
    cut = layout.matrices()
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        for part in cut.get(name, (name,)):
            found[part] = layout.pieces[part].stored_shape if part in layout.pieces else shape
        if name in layout.adapters:
            found |= layout.adapters[name].factor_shapes()
    return found


def trained_names(shapes: Shapes, layout: CompactLayout | None) -> list[str]:
    """Return the parameters of the built model that carry optimizer state."""
    whole = frozenset() if layout is None else layout.plan.whole
    return [name for name in shapes if name not in whole]


def offloads(zero: Mapping[str, Any]) -> bool:
    """Return whether the DeepSpeed JSON keeps optimizer states in host memory."""
    return (zero.get("offload_optimizer") or {}).get("device") == "cpu"


def sub_groups(slices: Sequence[int], limit: int) -> list[int]:
    """Return the elements of each group of slices that the optimizer steps at a time.

    DeepSpeed closes a group with the slice that reaches ``sub_group_size``.

    Args:
        slices: Elements of each trained slice, padding included.
        limit: ``sub_group_size``.
    """
    groups: list[int] = []
    current = 0
    for size in slices:
        current += size
        if current >= limit:
            groups.append(current)
            current = 0
    return groups + [current] if current else groups


def state_bytes(
    recipe: Recipe, shapes: Shapes, layout: CompactLayout | None, world_size: int
) -> StateBytes:
    """Return what one rank holds between steps.

    Args:
        recipe: Resolved recipe.
        shapes: Parameter shapes of the source model.
        layout: How the freeze plan is stored; None where there is no plan.
        world_size: Number of ranks, > 0.
    """
    built = built_shapes(shapes, layout)
    slices = {name: -(-math.prod(shape) // world_size) for name, shape in built.items()}
    trained = sum(slices[name] for name in trained_names(built, layout))
    offloaded = offloads(read_deepspeed(recipe.deepspeed)["zero_optimization"])
    width = DTYPE_BYTES[recipe.model.dtype]
    return StateBytes(
        weights=width * sum(slices.values()),
        masters=4 * trained,
        moments=8 * trained,
        gradients=accumulation_bytes(recipe) * trained,
        step_gradients=4 * trained if offloaded else 0,
        offloaded=offloaded,
    )


def copy_bytes(
    recipe: Recipe, shapes: Shapes, layout: CompactLayout | None, world_size: int, *, locked: bool
) -> int:
    """Return the host memory of one rank for the copies that are written beside training.

    Master and two moments of each trained element, 12 bytes. There is room for one set of copies,
    kept from save to save: the next save waits for the one before it. Without background writing
    (``train.checkpoint_mode: sync``) there are none.

    Args:
        recipe: Resolved recipe.
        shapes: Parameter shapes of the source model.
        layout: How the freeze plan is stored; None where there is no plan.
        world_size: Number of ranks, > 0.
        locked: The room is page-locked, as where there is a GPU: torch hands out each tensor's
            part in powers of two.
    """
    if recipe.train.checkpoint_mode == "sync":
        return 0
    built = built_shapes(shapes, layout)
    total = 0
    for name in trained_names(built, layout):
        part = 4 * -(-math.prod(built[name]) // world_size)
        total += NUM_STATES * (1 << (part - 1).bit_length() if locked else part)
    return total


def accumulation_bytes(recipe: Recipe) -> int:
    """Return the bytes of one accumulated gradient element."""
    if recipe.model.dtype == "float32":
        return 4
    return DTYPE_BYTES[recipe.train.accumulation_dtype]

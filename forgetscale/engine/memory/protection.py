"""Bytes that penalties and projections keep on one rank, and a Fisher basis on disk, from shapes.

Ranks of bases are taken at their cap, ``fisher.max_rank``; a measured basis may have fewer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from forgetscale.config import STRUCTURES_OF, Recipe
from forgetscale.engine.adapters import find_adapters
from forgetscale.engine.memory.state import DTYPE_BYTES, Shapes, StateBytes, state_bytes

FLOAT = 4
ADAPTER_KINDS = ("alignguard_lora", "ewc_lora", "l2_sp_lora")
"""Methods that hold an adapter's update, which starts at zero: they keep no anchor."""

FACTOR_SIDES = ("asft_lora", "salora", "lora_null")
"""Methods that keep directions of one side of every adapted matrix, whole on every rank."""


@dataclass(frozen=True, slots=True)
class ProtectionBytes:
    """What a method of this family keeps."""

    anchors: int = 0
    """Slices of the source weights, in the model's type, or of weights kept for the length of a
    step, on one rank."""
    basis: int = 0
    """Fisher basis or leading directions, on one rank."""
    disk: int = 0
    """The Fisher basis as a folder, of all ranks together."""


def body_matrices(structure: Any, names: tuple[str, ...] | None) -> dict[str, tuple[int, int]]:
    """Return name -> shape of the matrices of the decoder body that a recipe names.

    Args:
        structure: Source model on the meta device.
        names: ``target_modules``; None takes all.
    """
    ends = (structure.get_input_embeddings(), structure.get_output_embeddings())
    skipped = {id(param) for module in ends for param in module.parameters()}
    found = {}
    for name, param in structure.named_parameters():
        module = name.removesuffix(".weight")
        wanted = names is None or any(module == n or module.endswith(f".{n}") for n in names)
        if param.dim() == 2 and id(param) not in skipped and wanted:
            found[name] = (int(param.shape[0]), int(param.shape[1]))
    return found


def basis_bytes(
    matrices: Mapping[str, tuple[int, int]], kind: str, max_rank: int, world_size: int = 1
) -> int:
    """Return the bytes of one part of a basis on one rank (with one rank: on disk).

    Args:
        matrices: Name -> shape.
        kind: ``diagonal``, ``vector``, ``left`` or ``right``.
        max_rank: Directions of a matrix, no more than its smaller side can have.
        world_size: Ranks that share what is as long as a weight; of a left side each keeps the
            rows its slice touches, a right side is whole on every rank.
    """
    total = 0
    for height, width in matrices.values():
        numel = -(-height * width // world_size)
        if kind == "diagonal":
            total += numel
        elif kind == "vector":
            total += numel * max_rank
        elif kind == "left":
            rows = height if world_size == 1 else min(height, -(-numel // width) + 1)
            total += rows * min(max_rank, height)
        else:
            total += width * min(max_rank, width)
    return FLOAT * total


def protection_bytes(
    recipe: Recipe, structure: Any, shapes: Shapes, world_size: int
) -> ProtectionBytes:
    """Return what the recipe's method keeps beside the model and the optimizer.

    Args:
        recipe: Resolved recipe.
        structure: Source model on the meta device.
        shapes: Its parameter shapes.
        world_size: Number of ranks, > 0.
    """
    method: Any = recipe.method
    kind = method.kind
    if kind in FACTOR_SIDES:
        return _factor_sides(recipe, structure)
    if kind in ("spd", "mofo"):
        # spd: all source values; mofo: the weights of before a step, in fp32, of matrices.
        kept = [math.prod(s) for s in shapes.values() if kind == "spd" or len(s) > 1]
        size = DTYPE_BYTES[recipe.model.dtype] if kind == "spd" else FLOAT
        return ProtectionBytes(size * sum(-(-numel // world_size) for numel in kept))
    if kind not in ("l2_sp", "ewc", "online_ewc", "alignguard", "osf", *ADAPTER_KINDS):
        return ProtectionBytes()
    matrices = body_matrices(structure, method.target_modules)
    every = kind in ("l2_sp", "ewc", "online_ewc") and method.target_modules is None
    held = {name: (1, math.prod(s)) for name, s in shapes.items()} if every else matrices
    anchors = 0
    if kind not in ADAPTER_KINDS:
        sizes = (-(-height * width // world_size) for height, width in held.values())
        anchors = DTYPE_BYTES[recipe.model.dtype] * sum(sizes)
    if kind in ("l2_sp", "l2_sp_lora"):
        return ProtectionBytes(anchors)
    if kind == "osf":
        sides = (basis_bytes(matrices, side, method.rank, world_size) for side in ("left", "right"))
        return ProtectionBytes(anchors, sum(sides))
    parts = _needed_parts(method)
    # Forms on factors keep whole sides on every rank.
    ranks_of = {
        part: 1 if kind in ADAPTER_KINDS and part in ("left", "right") else world_size
        for part in parts
    }
    rank = method.fisher.max_rank
    mine = sum(basis_bytes(held, part, rank, ranks_of[part]) for part in parts)
    disk = sum(basis_bytes(held, part, rank) for part in {*parts, *method.fisher.structures})
    return ProtectionBytes(anchors, mine, disk)


def _needed_parts(method: Any) -> tuple[str, ...]:
    """Return the parts of a basis that a method goes by."""
    if not hasattr(method, "reading"):
        return ("diagonal",)
    collision = getattr(method, "collision", None)
    more = ("diagonal",) if collision is not None and collision.metric == "diagonal" else ()
    return (*STRUCTURES_OF[method.reading], *more)


def refresh_bytes(recipe: Recipe, shapes: Shapes, world_size: int) -> StateBytes | None:
    """Return what one rank holds of the second engine while a method measures again.

    Factors of sides come from forward and backward without an optimizer, so its weights are all;
    diagonals and flattened directions come from reduced gradients, and the engine that reduces
    them holds the states of every weight, with an adapter too.

    Args:
        recipe: Resolved recipe.
        shapes: Parameter shapes of the source model.
        world_size: Number of ranks, > 0.

    Returns:
        None for a method that does not measure again.
    """
    method: Any = recipe.method
    if getattr(method, "refresh", None) is None:
        return None
    found = state_bytes(recipe, shapes, None, world_size)
    if {*_needed_parts(method), *method.fisher.structures} <= {"left", "right"}:
        return StateBytes(found.weights, 0, 0, 0, 0, offloaded=False)
    return found


def _factor_sides(recipe: Recipe, structure: Any) -> ProtectionBytes:
    """Return the bytes of one side's directions of every adapted matrix."""
    method: Any = recipe.method
    total = 0
    for pair in find_adapters(recipe, structure).values():
        height, width = pair.shape
        if method.kind == "lora_null":
            total += FLOAT * width * pair.rank
        elif method.kind == "salora":
            total += FLOAT * height * max(1, min(method.num_directions, height // 2))
        else:
            total += FLOAT * height * min(height, width, method.num_directions or height)
    return ProtectionBytes(0, total, 0 if method.kind == "asft_lora" else total)

"""What a recipe will need on one rank, byte by byte; ``launch/bench/memory_model.py`` checks it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from forgetscale.config import Recipe
from forgetscale.config.deepspeed import read_deepspeed
from forgetscale.engine.extras import reference_of, reference_top_k
from forgetscale.engine.memory import (
    GatherSettings,
    Setting,
    StateBytes,
    Trace,
    built_shapes,
    copy_bytes,
    gathered_elements,
    state_bytes,
    trace_micro_batch,
)
from forgetscale.engine.memory.protection import ProtectionBytes
from forgetscale.engine.memory.state import (
    DTYPE_BYTES,
    Shapes,
    accumulation_bytes,
    offloads,
    sub_groups,
    trained_names,
)
from forgetscale.engine.memory.trace import ACTIVATIONS, BACKWARD, LOSS
from forgetscale.masks import CompactLayout
from forgetscale.ops.losses import LossFunction

_REDUCE_BUCKET, _SUB_GROUP = 500_000_000, 1_000_000_000
"""DeepSpeed's defaults, in elements."""
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_COMMUNICATION = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes on one rank. The parts of the model's pass are those of its largest moment."""

    state: StateBytes
    """What lasts from step to step."""
    bucket: int
    """ZeRO-3's gradient bucket, allocated once."""
    buffers: int
    """The model's buffers."""
    gathered: int
    """Parameters gathered from all ranks; 0 with one rank, which computes with its slices."""
    activations: int
    """Kept for backward, and temporaries of forward and of recomputation."""
    loss: int
    """Logits of one chunk, their gradients, the gradient of the output head."""
    backward: int
    """Gradients on their way into the bucket, copies for the reduction, temporaries."""
    protection: ProtectionBytes
    """Anchors and bases of penalties and projections; beside the masters, so on the host with
    offload."""
    reference: int
    """Slices of the frozen source model that the loss looks at; 0 without one or with a cache."""
    refresh: StateBytes | None
    """Second engine while a method measures again between steps; None without a refresh."""
    step: int
    """Copies of gradients while the optimizer steps; nothing of the model's pass is left then."""
    copies: int
    """Host memory for the states that a checkpoint writes beside training; 0 when training waits
    for its saves."""

    @property
    def micro_batch(self) -> int:
        """Bytes of forward and backward beside what lasts, at the largest moment."""
        return self.gathered + self.activations + self.loss + self.backward

    @property
    def device(self) -> int:
        """Peak where the model computes."""
        lasting = self.state.device + self.bucket + self.buffers + self.reference
        lasting += 0 if self.state.offloaded else self._kept
        again = 0 if self.refresh is None else self.refresh.device
        return lasting + max(again + self.micro_batch, self.step)

    @property
    def host(self) -> int:
        """Bytes in host memory, through offload and for checkpoints written beside training."""
        again = 0 if self.refresh is None else self.refresh.host
        kept = self._kept if self.state.offloaded else 0
        return self.state.host + again + kept + self.copies

    @property
    def _kept(self) -> int:
        return self.protection.anchors + self.protection.basis


def micro_batch_setting(recipe: Recipe, block: int, world_size: int, device: str) -> Setting:
    """Return what one micro-batch of a recipe looks like.

    Args:
        recipe: Resolved recipe.
        block: Tokens of a row.
        world_size: Number of ranks.
        device: ``cuda`` or ``cpu``.
    """
    found = read_deepspeed(recipe.deepspeed)
    working = _DTYPES[recipe.model.dtype]
    asked = found.get("communication_data_type")
    accumulation = torch.float32 if accumulation_bytes(recipe) == 4 else torch.bfloat16
    return Setting(
        rows=recipe.train.micro_batch_size,
        block=block,
        dtype=working,
        checkpointing=recipe.model.activation_checkpointing,
        document_mask=recipe.data.document_mask,
        loss_chunk_size=recipe.train.loss_chunk_size,
        bucket_elements=_bucket_elements(found["zero_optimization"]),
        accumulation=accumulation,
        communication=working if asked is None else _COMMUNICATION[asked.lower()],
        world_size=world_size,
        gloo=device == "cpu",
        reference_ids=reference_top_k(recipe),
    )


def _bucket_elements(zero: dict[str, Any]) -> int:
    return int(zero.get("reduce_bucket_size", _REDUCE_BUCKET))


def trace_recipe(
    recipe: Recipe,
    config: Any,
    layout: CompactLayout | None,
    *,
    block: int,
    world_size: int,
    device: str,
    loss: LossFunction,
) -> Trace:
    """Run one micro-batch of a recipe on fake tensors.

    Args:
        recipe: Resolved recipe.
        config: Hugging Face configuration of the source model.
        layout: How the freeze plan is stored, or None.
        block: Tokens of a row.
        world_size: Number of ranks.
        device: ``cuda`` or ``cpu``.
        loss: Loss of the method.
    """
    setting = micro_batch_setting(recipe, block, world_size, device)
    return trace_micro_batch(config, layout, setting, loss)


def estimate_memory(
    recipe: Recipe,
    shapes: Shapes,
    layout: CompactLayout | None,
    trace: Trace,
    *,
    world_size: int,
    device: str = "cuda",
    edits_gradients: bool = False,
    protection: ProtectionBytes | None = None,
    refresh: StateBytes | None = None,
) -> MemoryEstimate:
    """Put the parts together.

    Args:
        recipe: Resolved recipe.
        shapes: Parameter shapes of the source model.
        layout: How the freeze plan is stored; None where there is no plan.
        trace: From ``trace_recipe``.
        world_size: Number of ranks, > 0.
        device: ``cuda`` or ``cpu``, where the model computes.
        edits_gradients: The method edits gradients, which it sees in fp32.
        protection: What penalties and projections keep; None for nothing.
        refresh: Second engine of a method that measures again; None without. Its micro-batches
            are taken to be as large as those of training.
    """
    zero = read_deepspeed(recipe.deepspeed)["zero_optimization"]
    width = DTYPE_BYTES[recipe.model.dtype]
    gathered = gathered_elements(
        trace.numels,
        trace.params_of,
        trace.events,
        world_size=world_size,
        settings=GatherSettings.read(zero),
    )
    total = [peak + width * held for (peak, _), held in zip(trace.peaks, gathered, strict=True)]
    largest = max(range(len(total)), key=total.__getitem__)
    parts = trace.peaks[largest][1]
    bucket = 0
    if zero.get("contiguous_gradients", True):
        setting = micro_batch_setting(recipe, 1, world_size, "cpu")
        bucket = setting.bucket_elements * setting.communication.itemsize
    return MemoryEstimate(
        protection=protection or ProtectionBytes(),
        state=state_bytes(recipe, shapes, layout, world_size),
        bucket=bucket,
        buffers=trace.buffer_bytes,
        gathered=width * gathered[largest],
        activations=parts.get(ACTIVATIONS, 0),
        loss=parts.get(LOSS, 0),
        backward=parts.get(BACKWARD, 0),
        reference=_reference_bytes(recipe, shapes, world_size),
        refresh=refresh,
        step=_step_copies(recipe, shapes, layout, world_size, zero, edits_gradients),
        copies=copy_bytes(recipe, shapes, layout, world_size, locked=device == "cuda"),
    )


def _reference_bytes(recipe: Recipe, shapes: Shapes, world_size: int) -> int:
    reference = reference_of(recipe)
    if reference is None or reference.model is None:
        return 0
    whole = sum(-(-math.prod(shape) // world_size) for shape in shapes.values())
    return whole * DTYPE_BYTES[recipe.model.dtype]


def _step_copies(
    recipe: Recipe,
    shapes: Shapes,
    layout: CompactLayout | None,
    world_size: int,
    zero: dict[str, Any],
    edits_gradients: bool,
) -> int:
    built = built_shapes(shapes, layout)
    slices = [-(-math.prod(built[n]) // world_size) for n in trained_names(built, layout)]
    width = accumulation_bytes(recipe)
    edited = 4 * sum(slices) if edits_gradients and width != 4 else 0
    if offloads(zero):
        return edited
    groups = sub_groups(slices, int(zero.get("sub_group_size", _SUB_GROUP)))
    # Gradients of a group are laid end to end, then cast.
    return max(edited, max(groups, default=0) * (4 if width == 4 else 4 + width))

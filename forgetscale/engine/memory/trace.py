"""One micro-batch, forward and backward, on fake tensors: the engine's code, none of its memory.

The model is the one training builds: compact layers, activation checkpointing, chunked loss, and
the gradient bucket of ZeRO-3. Kernels are those of the CPU build; fused attention keeps the same
tensors there as on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import masking_utils

from forgetscale.engine.memory.gather import Action, Event
from forgetscale.engine.memory.live import LiveBytes, Parts
from forgetscale.masks import CompactLayout
from forgetscale.models import (
    CausalLMWithLoss,
    build_skeleton,
    enable_checkpointing,
    make_adapters,
    make_compact,
    parameters_on_meta,
)
from forgetscale.ops import anchors, chunked
from forgetscale.ops.losses import LossFunction, TokenLoss

ACTIVATIONS, LOSS, BACKWARD = "activations", "loss", "backward"


@dataclass(frozen=True, slots=True)
class Setting:
    """What a micro-batch looks like and how it is computed."""

    rows: int
    """Sequences of one forward pass."""
    block: int
    """Tokens of a sequence."""
    dtype: torch.dtype
    """Working type."""
    checkpointing: bool
    """Each decoder layer is computed again in backward."""
    document_mask: bool
    """Attention gets a mask ``[rows, 1, block, block]``."""
    loss_chunk_size: int
    """Positions whose logits exist at one time."""
    bucket_elements: int
    """``reduce_bucket_size``."""
    accumulation: torch.dtype
    """Type in which gradients are summed."""
    communication: torch.dtype
    """Type in which gradients are reduced."""
    world_size: int
    """Number of ranks."""
    gloo: bool
    """Ranks talk through gloo, which copies what it reduces (NCCL does not)."""
    reference_ids: int = 1
    """Tokens per position that a loss gets of a reference model."""


@dataclass(slots=True)
class Trace:
    """What a micro-batch showed."""

    names: list[str]
    """Parameters of the built model."""
    numels: list[int]
    params_of: dict[int, list[int]]
    """Module -> numbers of the parameters it owns."""
    events: list[Event] = field(default_factory=list)
    peaks: list[tuple[int, Parts]] = field(default_factory=list)
    """Largest bytes from each event to the next, and what they are for."""
    flops: int = 0
    """Floating-point operations of matrix products, recomputed ones too."""
    buffer_bytes: int = 0
    """Buffers of the model (rotary frequencies, indices of compact layers)."""


class _Mark(torch.autograd.Function):
    """Hands a tensor through; calls back when its gradient passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: Callable[[], None]) -> Tensor:
        ctx.call = call
        return x.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.call()
        return grads[0], None


class _Bucket:
    """ZeRO-3's gradient bucket (``reduce_independent_p_g_buckets_and_remove_grads``).

    The bucket itself stands for the whole run and is counted elsewhere. A gradient that does not
    fit stays where it is until the next parameter's; a full bucket is copied once for the
    reduction, and its slices once more where gradients are summed in another type.
    """

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._numels: list[int] = []
        self._too_large: list[Tensor] = []

    def add(self, param: Tensor) -> None:
        """Take a parameter's gradient."""
        grad = param.grad
        assert grad is not None
        if self._numels and sum(self._numels) + grad.numel() > self._setting.bucket_elements:
            self.flush()
        if sum(self._numels) + grad.numel() > self._setting.bucket_elements:
            self._too_large.append(grad)
        self._numels.append(grad.numel())
        param.grad = None

    def flush(self) -> None:
        """Reduce what is in the bucket."""
        if not self._numels:
            return
        setting, size = self._setting, self._setting.world_size
        converted = []
        if setting.communication != setting.dtype:
            converted = [torch.empty(n, dtype=setting.communication) for n in self._numels]
        slices = [-(-numel // size) for numel in self._numels]
        if len(slices) > 1 or self._numels[0] % size:
            converted.append(torch.empty(sum(slices) * size, dtype=setting.communication))
        if setting.gloo:
            converted.append(torch.empty(sum(slices) * size, dtype=setting.communication))
            converted.pop()
        if setting.communication != setting.accumulation:
            converted += [torch.empty(part, dtype=setting.accumulation) for part in slices]
        del converted
        self._numels.clear()
        self._too_large.clear()


class _Recorder:
    """Hooks on every module that owns parameters, placed as DeepSpeed places its own."""

    def __init__(self, model: CausalLMWithLoss, head: nn.Module) -> None:
        self._head = head
        self._depth = 0
        self._in_head = False
        names = [name for name, _ in model.named_parameters()]
        params = list(model.parameters())
        number = {id(param): index for index, param in enumerate(params)}
        self.modules = [m for m in model.modules() if any(True for _ in m.parameters(False))]
        self.trace = Trace(
            names=[name.removeprefix(CausalLMWithLoss.PREFIX) for name in names],
            numels=[param.numel() for param in params],
            params_of={
                index: [number[id(p)] for p in module.parameters(recurse=False)]
                for index, module in enumerate(self.modules)
            },
        )
        self.live: LiveBytes | None = None
        self._remaining: dict[int, int] = {}
        for index, module in enumerate(self.modules):
            module.register_forward_pre_hook(self._before(index))
            module.register_forward_hook(self._after(index), always_call=True)
        model.register_forward_pre_hook(lambda *_: self._enter(1))
        model.register_forward_hook(lambda *_: self._enter(-1))

    def label(self) -> str:
        """Say for what a new tensor is made."""
        if self._in_head:
            return LOSS
        return ACTIVATIONS if self._depth else BACKWARD

    def _enter(self, step: int) -> None:
        self._depth += step

    def _event(self, action: Action, index: int) -> None:
        assert self.live is not None
        if self.trace.events:
            self.trace.peaks.append(self.live.take_peak())
        else:
            self.live.take_peak()
        self.trace.events.append(Event(action, index))

    def _before(self, index: int) -> Callable[..., Any]:
        def ended() -> None:
            self._remaining[index] -= 1
            if self._remaining[index] == 0:
                self._event("release", index)
                if self.modules[index] is self._head:
                    self._in_head = False

        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            self._enter(1)
            self._in_head = module is self._head
            self._event("fetch", index)
            self._remaining[index] = 0
            marked: list[Any] = []
            for value in inputs:
                if isinstance(value, Tensor) and value.requires_grad:
                    self._remaining[index] += 1
                    value = _Mark.apply(value, ended)  # type: ignore[no-untyped-call]
                marked.append(value)
            return tuple(marked)

        return hook

    def _after(self, index: int) -> Callable[..., Any]:
        def begins() -> None:
            self._in_head = self.modules[index] is self._head
            self._event("fetch", index)

        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
            self._enter(-1)
            self._in_head = False
            self._event("release", index)
            if isinstance(output, Tensor) and output.requires_grad:
                return _Mark.apply(output, begins)  # type: ignore[no-untyped-call]
            return output

        return hook

    def finish(self, live: LiveBytes) -> Trace:
        """Close the last interval."""
        self.trace.peaks.append(live.take_peak())
        self.trace.flops = live.flops
        return self.trace


def _with_fake_weights(model: nn.Module, dtype: torch.dtype, frozen: frozenset[str]) -> None:
    """Give every parameter the working type, and whole frozen ones no gradient; ties stay."""
    made: dict[int, nn.Parameter] = {}
    for prefix, module in model.named_modules():
        for leaf, old in list(module._parameters.items()):
            if old is None:
                continue
            if id(old) not in made:
                name = f"{prefix}.{leaf}" if prefix else leaf
                values = torch.empty(old.shape, dtype=dtype)
                made[id(old)] = nn.Parameter(values, requires_grad=name not in frozen)
            module._parameters[leaf] = made[id(old)]
        for leaf, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[leaf] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _structure(config: Any, layout: CompactLayout | None) -> Any:
    """Return the model as training builds it, without memory for weights."""
    model = build_skeleton(config)
    if layout is not None:
        with parameters_on_meta():
            make_compact(model, layout)
            make_adapters(model, layout.adapters)
    return model


def _wrap(model: Any, layout: CompactLayout | None, setting: Setting) -> CausalLMWithLoss:
    frozen = frozenset() if layout is None else layout.plan.whole
    _with_fake_weights(model, setting.dtype, frozen)
    if setting.checkpointing:
        enable_checkpointing(model)
    wrapped = CausalLMWithLoss(model, setting.loss_chunk_size)
    wrapped.train()
    return wrapped


@contextmanager
def _known_values(model: CausalLMWithLoss, setting: Setting) -> Iterator[None]:
    """Tell attention and loss what they would read from values, which fake tensors do not have.

    ``transformers`` builds a whole mask where it cannot look whether positions restart. Here rows
    are one text each, or get the mask of packed documents. Every position has a target.
    """
    original, target_rows = masking_utils.find_packed_sequence_indices, chunked.target_rows
    base = model.model.base_model
    eager = base.config._attn_implementation == "eager"

    def hidden_states(input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        kind = setting.dtype if eager else torch.bool
        mask = torch.empty(setting.rows, 1, setting.block, setting.block, dtype=kind)
        found = base(input_ids=input_ids, use_cache=False, attention_mask=mask)
        hidden: Tensor = found.last_hidden_state
        return hidden

    if setting.document_mask:
        object.__setattr__(model, "hidden_states", hidden_states)
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    chunked.target_rows = lambda labels, size, *, check=True: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = original
        chunked.target_rows = target_rows


def trace_micro_batch(
    config: Any, layout: CompactLayout | None, setting: Setting, loss: LossFunction
) -> Trace:
    """Run one micro-batch on fake tensors.

    Args:
        config: Hugging Face configuration. ``flash_attention_2`` is traced as ``sdpa``: it keeps
            the same tensors, and its kernels need a GPU.
        layout: How the freeze plan is stored, or None.
        setting: The micro-batch.
        loss: Loss function of the method.
    """
    asked = config._attn_implementation
    if asked not in ("sdpa", "eager"):
        config._attn_implementation = "sdpa"
    try:
        structure = _structure(config, layout)
        with FakeTensorMode(allow_non_fake_inputs=True):
            return _run(_wrap(structure, layout, setting), setting, loss)
    finally:
        config._attn_implementation = asked


def _stand_in_extra(loss: LossFunction, setting: Setting) -> dict[str, Tensor]:
    """Return tensors of the shapes of those that the loss needs beside logits and labels."""
    found = {}
    for name in loss.needs if isinstance(loss, TokenLoss) else ():
        per_id = (setting.reference_ids,) if name in anchors.PER_ID else ()
        dtype = torch.int32 if name == "source_ids" else torch.float32
        found[name] = torch.zeros(setting.rows, setting.block, *per_id, dtype=dtype)
    return found


def _run(model: CausalLMWithLoss, setting: Setting, loss: LossFunction) -> Trace:
    recorder = _Recorder(model, model.head)
    bucket = _Bucket(setting)
    param: Any
    for param in model.parameters():
        if param.requires_grad:
            param.register_post_accumulate_grad_hook(bucket.add)
    ids = torch.zeros(setting.rows, setting.block, dtype=torch.int64)
    extra = _stand_in_extra(loss, setting)
    known: Sequence[Tensor] = [*model.parameters(), *model.buffers(), ids, *extra.values()]
    recorder.trace.buffer_bytes = sum(b.numel() * b.element_size() for b in model.buffers())
    with _known_values(model, setting), LiveBytes(recorder.label, known) as live:
        recorder.live = live
        value = model(ids, labels=ids, loss=loss, extra=extra)
        scaled = value * 1.0
        del value
        scaled.backward()
        bucket.flush()
    return recorder.finish(live)

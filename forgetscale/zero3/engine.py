"""A ZeRO-3 model with an optimizer, behind the few calls the training loop needs."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from forgetscale.config import OptimConfig
from forgetscale.errors import ShardError
from forgetscale.masks import AdapterPair, CompactLayout, FreezePlan
from forgetscale.zero3.shards import Slice, ZeroShards, gather_slice, locate_all
from forgetscale.zero3.world import World

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ReadSlice = Callable[[str, int, int, torch.dtype], Tensor]
"""``(name, start, length, dtype) -> [length]``: elements of a flattened source tensor."""


def construct_partitioned(
    construct: Callable[[], nn.Module], config: Mapping[str, Any], dtype: torch.dtype
) -> nn.Module:
    """Build a model whose parameters are cut up as soon as each module exists.

    The type comes from ``config``: on a machine without fp16 support ``zero.Init`` turns an
    explicit ``dtype=torch.float32`` into bfloat16, and the "fp32" run that follows is none.

    Args:
        construct: Builds the module.
        config: Full DeepSpeed configuration.
        dtype: Type that ``config`` asks for.

    Raises:
        ShardError: DeepSpeed chose another type than ``dtype``.

    Collective: every rank must call it.
    """
    import deepspeed

    with deepspeed.zero.Init(config_dict_or_path=dict(config)):
        model = construct()
    param: Any
    for name, param in model.named_parameters():
        if param.ds_tensor.dtype != dtype:
            raise ShardError(
                f"{name} was partitioned as {param.ds_tensor.dtype}, expected {dtype}; this version"
                " of DeepSpeed handles precision differently from the tested one (0.19.8)."
            )
    return model


def fill_slices(slices: list[Slice], read: ReadSlice) -> None:
    """Load this rank's slices from the source model and set padding to zero.

    DeepSpeed allocates padding without clearing it; it may hold NaN, and the optimizer steps over
    it like over any element.
    """
    for item in slices:
        whole = item.param.ds_tensor.data.view(-1)
        whole[item.length :] = 0
        if item.length:
            values = read(item.name, item.start, item.length, whole.dtype)
            whole[: item.length].copy_(values)


@dataclass(frozen=True, slots=True)
class Matrix:
    """One parameter of the source model and where it lies on this rank."""

    name: str
    """Name in the source model."""
    shape: tuple[int, ...]
    slices: list[Slice]
    """One slice, or two where the layout cuts the matrix."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole parameter in the model's type."""
        return math.prod(self.shape) * self.slices[0].working.element_size()


class ZeroEngine:
    """One partitioned model on this rank.

    Args:
        engine: DeepSpeed engine.
        shards: Slices of the model.
        world: This process among all.
        layout: How the freeze plan is stored.
    """

    def __init__(
        self, engine: Any, shards: ZeroShards, world: World, layout: CompactLayout
    ) -> None:
        self._engine = engine
        self.shards = shards
        self.world = world
        self.layout = layout
        self._by_name = {item.name: item for item in shards.slices}

    @property
    def module(self) -> nn.Module:
        """The wrapped module; its parameters are empty outside forward."""
        module: nn.Module = self._engine.module
        return module

    @property
    def skipped_steps(self) -> int:
        """Steps that DeepSpeed passed over, all of them on request: see ``pass_over``."""
        return int(self._engine.skipped_steps)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run forward. Collective: every rank must call it with the same shapes of work."""
        return self._engine(*args, **kwargs)

    def set_training(self, training: bool) -> None:
        """Switch dropout and activation checkpointing on or off."""
        self._engine.train(training)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add gradients of an already normalised loss; reduce over ranks.

        Args:
            loss: Scalar whose gradient, summed over micro-batches and averaged over ranks, is
                the gradient of the step.
            last: True for the step's last micro-batch.

        Collective: every rank must call it.
        """
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss, scale_wrt_gas=False)
        if last:
            self.shards.collect_gradients()

    def backward_activations(self, *args: Any, **kwargs: Any) -> None:
        """Run forward and carry the gradient of the returned scalar back to the activations.

        For a model without optimizer. DeepSpeed's engine would prepare the optimizer's backward,
        so it is passed by; the hooks that gather weights, in backward too, sit on the modules.

        Collective: every rank must call it.
        """
        loss: Tensor = self._engine.module(*args, **kwargs)
        loss.backward()  # type: ignore[no-untyped-call]
        forward_only: Any = self._engine.optimizer
        forward_only.release_backward_leftovers()

    def step(self, lr: float) -> float:
        """Clip, update, and return the norm of the unclipped gradient.

        Raises:
            ShardError: DeepSpeed skipped the step.

        Collective: every rank must call it.
        """
        for group in self._engine.optimizer.optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()
        if not self._engine.was_step_applied():
            raise ShardError(
                f"rank {self.world.rank}: DeepSpeed skipped an optimizer step; the gradient norm"
                " was not finite although every gradient was checked."
            )
        self.shards.clear_gradients()
        return float(self._engine.get_global_grad_norm())

    def pass_over(self) -> None:
        """Throw the gradients of a step away: no master, moment or count of steps changes.

        By DeepSpeed's own way for gradients that are not finite, so its inner state stays right.

        Raises:
            ShardError: DeepSpeed did the step all the same.

        Collective: every rank must call it.
        """
        self.shards.spoil_gradients()
        self._engine.step()
        if self._engine.was_step_applied():
            raise ShardError(
                f"rank {self.world.rank}: DeepSpeed did an optimizer step on gradients that are not"
                " finite; this version handles them differently from the tested one (0.19.8)."
            )
        self.shards.clear_gradients()

    def matrices(self) -> list[Matrix]:
        """Return the source model's parameters in the model's order, with the slices they are in.

        A matrix that the layout cuts has two slices here; factors of adapters are no part of it.
        """
        found: dict[str, list[Slice]] = {}
        factors = self.layout.factors()
        for item in self.shards.slices:
            if item.name in factors:
                continue
            found.setdefault(self.layout.matrix_of(item.name), []).append(item)
        return [
            Matrix(
                name,
                self.layout.pieces[items[0].name].shape
                if items[0].name in self.layout.pieces
                else items[0].shape,
                items,
            )
            for name, items in found.items()
        ]

    def gather_working(self, matrix: Matrix, destination: int) -> Tensor | None:
        """Return a whole parameter in the model's type on ``destination``, None elsewhere.

        The update of an adapter is added: in fp32, from the masters of its factors, rounded once.
        Collective: every rank must call it.
        """
        parts = [
            gather_slice(item, item.param.ds_tensor.data.view(-1), self.world.size, destination)
            for item in matrix.slices
        ]
        pair = self.layout.adapters.get(matrix.name)
        if pair is not None:
            factors = self.gather_factors(pair, destination)
            if parts[0] is None or factors is None:
                return None
            return (parts[0].float() + pair.delta(factors)).to(parts[0].dtype)
        if parts[0] is None or matrix.slices[0].name not in self.layout.pieces:
            return parts[0]
        whole = parts[0].new_empty(matrix.shape)
        for item, part in zip(matrix.slices, parts, strict=True):
            assert part is not None
            self.layout.pieces[item.name].put_(whole, part)
        return whole

    def gather_factors(self, pair: AdapterPair, destination: int) -> dict[str, Tensor] | None:
        """Return the fp32 masters of a pair's factors on ``destination``, None elsewhere.

        Collective: every rank must call it.
        """
        found: dict[str, Tensor] = {}
        for name in pair.factor_shapes():
            item = self._by_name[name]
            padded = self.shards.padded_master(item)
            whole = gather_slice(item, padded, self.world.size, destination)
            if whole is not None:
                found[name] = whole
        return found or None

    def destroy(self) -> None:
        """Free the model, its hooks and its buffers."""
        self._engine.destroy()
        for item in self.shards.slices:
            item.param.ds_tensor.data = torch.empty(0)
        del self._engine
        gc.collect()


def build_engine(
    wrapped: nn.Module,
    *,
    prefix: str,
    read: ReadSlice,
    world: World,
    config: Mapping[str, Any],
    layout: CompactLayout | None = None,
    optim: OptimConfig | None = None,
) -> ZeroEngine:
    """Load the weights into a partitioned module and give it to DeepSpeed.

    Args:
        wrapped: Module from ``construct_partitioned``, wrapped for training.
        prefix: What stands before checkpoint names in ``wrapped``.
        read: Reader of the source model.
        world: This process among all.
        config: Full DeepSpeed configuration.
        layout: How the freeze plan is stored, if there is one; whole parameters of its plan get no
            gradient and no optimizer state.
        optim: AdamW settings; None builds a model for forward passes only.

    Collective: every rank must call it.
    """
    import deepspeed

    slices = locate_all(wrapped, prefix, world.rank, world.size)
    fill_slices(slices, read)
    optimizer = None
    for item in slices:
        item.param.requires_grad_(
            optim is not None and not (layout is not None and item.name in layout.plan.whole)
        )
    trained = [item for item in slices if item.param.requires_grad]
    if optim is not None:
        # Decay is ours (masked, in ``ZeroShards.freeze``), so the optimizer's own is off.
        optimizer = torch.optim.AdamW(
            [item.param for item in trained],
            lr=0.0,
            betas=optim.betas,
            eps=optim.eps,
            weight_decay=0.0,
            fused=True,
        )
    engine, *_ = deepspeed.initialize(model=wrapped, optimizer=optimizer, config=dict(config))
    decayed = frozenset(item.name for item in trained if len(item.shape) > 1)
    plan = None if layout is None else layout.plan
    adapters = {} if layout is None else layout.adapters
    shards = ZeroShards(engine, slices, plan, world.size, decayed, adapters)
    return ZeroEngine(engine, shards, world, layout or CompactLayout({}, FreezePlan()))

"""This rank's slices of a ZeRO-3 model: gradients, master weights and working copy, kept in step.

Facts used here (DeepSpeed 0.19.8), each with a test that fails if it changes:

- rank ``r`` of ``W`` owns ``flat[r * p : (r + 1) * p]`` with ``p = ceil(numel / W)``; the tail of
  the last ranks is padding and must never be read;
- without optimizer offload the reduced gradients are slices of ``grad_partitions_flat_buffer``
  in the order of ``fp16_groups``; with offload they were already copied to
  ``fp32_partitioned_groups_flat[i].grad`` together with their norms, so an edit there must
  refresh the norm;
- with offload a parameter that the step's last micro-batch does not use loses its gradient;
- neither buffer is cleared between steps: a parameter without gradient would be updated with
  the gradient of an earlier step;
- a write to the master does not reach the working copy, nor copies that are gathered.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from forgetscale.api import ParamShard
from forgetscale.masks import AdapterPair, FreezePlan, Mask

STATES = ("master", "exp_avg", "exp_avg_sq")
"""What lasts from step to step for every trained element, all fp32."""


@dataclass(frozen=True, slots=True)
class Slice:
    """Where one parameter's slice lies on this rank."""

    name: str
    param: Any
    """The parameter, with DeepSpeed's attributes (``ds_tensor``, ``ds_numel`` ...)."""
    shape: tuple[int, ...]
    start: int
    length: int
    """Real elements, padding excluded; 0 on a rank that owns only padding."""

    @property
    def working(self) -> Tensor:
        """Working copy of the slice in the model's type, ``[length]``."""
        whole: Tensor = self.param.ds_tensor.data.view(-1)
        return whole[: self.length]


def locate(name: str, param: Any, rank: int, size: int) -> Slice:
    """Return the slice of a partitioned parameter that a rank owns.

    Args:
        name: Name in the checkpoint.
        param: Parameter cut by ``zero.Init``.
        rank: The rank, 0..size - 1.
        size: Number of ranks.
    """
    part = param.ds_tensor.numel()
    numel = int(param.ds_numel)
    assert part * size >= numel, (name, part, size, numel)
    start = min(rank * part, numel)
    return Slice(name, param, tuple(param.ds_shape), start, min(part, numel - start))


def locate_all(model: nn.Module, prefix: str, rank: int, size: int) -> list[Slice]:
    """Return the slices of all parameters of a partitioned model, in the model's order.

    Args:
        model: Model whose parameters are cut.
        prefix: What stands before checkpoint names.
        rank: The rank, 0..size - 1.
        size: Number of ranks.
    """
    found = []
    for name, param in model.named_parameters():
        assert name.startswith(prefix), name
        found.append(locate(name.removeprefix(prefix), param, rank, size))
    return found


def gather_slice(item: Slice, values: Tensor, size: int, destination: int | None) -> Tensor | None:
    """Assemble a whole tensor from all ranks' padded slices.

    Args:
        item: The slice.
        values: This rank's part, padding included, ``[ceil(numel / size)]``.
        size: Number of ranks.
        destination: Rank that gets the result; None gives it to all.

    Returns:
        The tensor in its shape, or None on other ranks. Collective: every rank must call it.
    """
    numel = int(item.param.ds_numel)
    values = values.detach().contiguous()
    if destination is None:
        whole = torch.empty(values.numel() * size, dtype=values.dtype, device=values.device)
        dist.all_gather(list(whole.chunk(size)), values)
        return whole[:numel].view(item.shape)
    parts = None
    if dist.get_rank() == destination:
        parts = [torch.empty_like(values) for _ in range(size)]
    dist.gather(values, parts, dst=destination)
    return None if parts is None else torch.cat(parts)[:numel].view(item.shape)


class ZeroShards:
    """``ShardSet`` over a DeepSpeed ZeRO-3 engine, and the engine's own shard work.

    Args:
        engine: DeepSpeed engine (with an optimizer for training, without for calibration).
        slices: All parameters of the model in its order.
        plan: Freeze plan, or None.
        size: Number of ranks.
        decayed: Names of parameters that weight decay applies to.
        adapters: Adapted matrix -> its factors, which are slices of their own.
    """

    def __init__(
        self,
        engine: Any,
        slices: list[Slice],
        plan: FreezePlan | None,
        size: int,
        decayed: frozenset[str] = frozenset(),
        adapters: Mapping[str, AdapterPair] | None = None,
    ) -> None:
        self.adapters: Mapping[str, AdapterPair] = adapters or {}
        self.lr = 0.0
        self.decay = 0.0
        self._stepped = False
        self.rank = dist.get_rank()
        self.size = size
        self._engine = engine
        self._slices = slices
        self._size = size
        self._decayed = decayed
        trained = hasattr(engine.optimizer, "fp16_groups")
        self._optimizer: Any = engine.optimizer if trained else None
        self._grads: dict[str, Tensor] = {}
        self._masters: dict[str, tuple[int, int]] = {}
        self._edited_grads: dict[str, Tensor] = {}
        if self._optimizer is not None:
            self._map_optimizer()
        self.masks: dict[str, Mask] = {}
        for item in slices:
            if plan is None:
                break
            mask = plan.slice_mask(item.name, item.shape, item.start, item.length)
            if mask is not None:
                self.masks[item.name] = mask

    # ---- layout -------------------------------------------------------------------------

    def _map_optimizer(self) -> None:
        optimizer = self._optimizer
        by_id = {id(item.param): item for item in self._slices}
        offset = 0
        for group in optimizer.fp16_groups:
            for param in group:
                item = by_id[id(param)]
                part = param.partition_numel()
                view = optimizer.grad_partitions_flat_buffer.narrow(0, offset, part)
                self._grads[item.name] = view[: item.length]
                sub_group, start, numel = optimizer.grad_position[optimizer.get_param_id(param)]
                assert numel == part, (item.name, numel, part)
                self._masters[item.name] = (sub_group, start)
                offset += part
        assert offset == optimizer.grad_partitions_flat_buffer.numel()

    @property
    def offloaded(self) -> bool:
        """True if optimizer states and gradients live in host memory."""
        return self._optimizer is not None and bool(self._optimizer.offload_optimizer)

    @property
    def trained(self) -> bool:
        """True if there is an optimizer, and so gradients."""
        return self._optimizer is not None

    @property
    def slices(self) -> list[Slice]:
        """All slices, trained or not."""
        return self._slices

    def master(self, item: Slice) -> Tensor:
        """Return the fp32 master slice (a view), or the working copy if it is not trained."""
        if item.name not in self._masters:
            return item.working
        sub_group, start = self._masters[item.name]
        flat: Tensor = self._optimizer.fp32_partitioned_groups_flat[sub_group]
        return flat.detach().narrow(0, start, item.length)

    def padded_master(self, item: Slice) -> Tensor:
        """Return a copy of the fp32 master slice where the model computes, padded for a gather."""
        padded = torch.zeros(item.param.ds_tensor.numel(), device=item.working.device)
        padded[: item.length] = self.master(item).float()
        return padded

    def gradient(self, item: Slice) -> Tensor | None:
        """Return the reduced gradient slice (a view DeepSpeed steps with), or None."""
        if item.name not in self._masters:
            return None
        if not self.offloaded:
            return self._grads[item.name]
        sub_group, start = self._masters[item.name]
        grad: Tensor = self._optimizer.fp32_partitioned_groups_flat[sub_group].grad
        return grad.narrow(0, start, item.length)

    # ---- optimizer state ----------------------------------------------------------------

    def states(self, item: Slice) -> dict[str, Tensor]:
        """Return the lasting state of a slice by ``STATES`` name, as views; {} if not trained.

        Moments that the optimizer has not made yet are made here, zero.
        """
        if item.name not in self._masters:
            return {}
        sub_group, start = self._masters[item.name]
        state = self._optimizer_state(sub_group)
        found = {"master": self.master(item)}
        for name in ("exp_avg", "exp_avg_sq"):
            found[name] = state[name].narrow(0, start, item.length)
        return found

    def _optimizer_state(self, sub_group: int) -> dict[str, Tensor]:
        flat = self._optimizer.fp32_partitioned_groups_flat[sub_group]
        state: dict[str, Tensor] = self._optimizer.optimizer.state[flat]
        if not state:
            # As torch's fused AdamW makes them at its first step.
            state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
            state["exp_avg"] = torch.zeros_like(flat.detach())
            state["exp_avg_sq"] = torch.zeros_like(flat.detach())
        return state

    @property
    def optimizer_steps(self) -> int:
        """Steps the optimizer has counted for its bias correction."""
        flats = range(len(self._optimizer.fp32_partitioned_groups_flat))
        counts = {int(self._optimizer_state(index)["step"]) for index in flats}
        assert len(counts) == 1, counts
        return counts.pop()

    @optimizer_steps.setter
    def optimizer_steps(self, count: int) -> None:
        for index in range(len(self._optimizer.fp32_partitioned_groups_flat)):
            self._optimizer_state(index)["step"].fill_(count)

    def state_bytes(self) -> dict[str, int]:
        """Return the bytes this rank holds for training, by what they are; measured, not computed.

        Working copies of all slices, and for trained ones masters, moments and the gradient buffer.
        """
        optimizer = self._optimizer
        flats = optimizer.fp32_partitioned_groups_flat
        moments = [self._optimizer_state(i)[k] for i in range(len(flats)) for k in STATES[1:]]
        gradients = [optimizer.grad_partitions_flat_buffer]
        working = [item.param.ds_tensor for item in self._slices]
        groups = {"weights": working, "masters": flats, "moments": moments, "gradients": gradients}
        return {
            name: sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            for name, tensors in groups.items()
        }

    # ---- ShardSet -----------------------------------------------------------------------

    def __iter__(self) -> Iterator[ParamShard]:
        """Yield slices with fp32 gradients; a bf16 gradient is a copy until ``write_gradients``.

        After the step gradients are zero, and no copies are made of them.
        """
        for item in self._slices:
            grad = self.gradient(item)
            if grad is not None and grad.dtype != torch.float32 and not self._stepped:
                grad = self._edited_grads.setdefault(item.name, grad.float())
            yield ParamShard(item.name, item.shape, item.start, grad, self.master(item))

    def all_reduce_sum(self, value: Tensor) -> Tensor:
        """Return the sum over ranks. Collective: every rank must call it."""
        device = self._slices[0].working.device
        result = value.detach().to(device, copy=True)
        dist.all_reduce(result)
        return result.to(value.device)

    def gather(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Return whole master weights in fp32. Collective: every rank must call it."""
        by_name = {item.name: item for item in self._slices}
        found = {}
        for name in names:
            item = by_name[name]
            whole = gather_slice(item, self.padded_master(item), self._size, None)
            assert whole is not None
            found[name] = whole
        return found

    def momentum(self, name: str) -> Tensor:
        """Return the fp32 first moment of a trained slice, a view."""
        (item,) = (item for item in self._slices if item.name == name)
        return self.states(item)["exp_avg"]

    # ---- between backward and step ------------------------------------------------------

    def collect_gradients(self) -> None:
        """Bring over gradients that DeepSpeed left behind; call it after the last backward.

        With offload it copies a gradient to the optimizer only in the step's last micro-batch, and
        only for parameters used there.
        """
        # Copies that a walk over the slices made before belong to an older gradient.
        self._edited_grads.clear()
        self._stepped = False
        for item in self._slices if self.offloaded else []:
            grad = self.gradient(item)
            if grad is not None and not bool(grad.any()):
                grad.copy_(self._grads[item.name])

    def non_finite(self) -> str | None:
        """Return the name of the first parameter whose gradient slice is not finite, or None.

        One read of the gradients; it looks at frozen elements too, so it must run before
        ``freeze``.
        """
        if self.offloaded:
            flats = [p.grad for p in self._optimizer.fp32_partitioned_groups_flat]
        else:
            flats = [self._optimizer.grad_partitions_flat_buffer]
        total = sum(torch.linalg.vector_norm(flat, dtype=torch.float32) for flat in flats)
        if bool(torch.isfinite(torch.as_tensor(total))):
            return None
        for item in self._slices:
            grad = self.gradient(item)
            if grad is not None and not bool(torch.isfinite(grad).all()):
                return item.name
        return None

    def norm_squared(self) -> float:
        """Return the squared norm of this rank's gradient slices, frozen elements among them."""
        if self.offloaded:
            flats = [p.grad for p in self._optimizer.fp32_partitioned_groups_flat]
        else:
            flats = [self._optimizer.grad_partitions_flat_buffer]
        norms = [torch.linalg.vector_norm(flat, dtype=torch.float32) for flat in flats]
        return float(sum(norm.double() ** 2 for norm in norms))

    def spoil_gradients(self) -> None:
        """Make every gradient NaN, with which DeepSpeed passes a step over."""
        if self.offloaded:
            for flat in self._optimizer.fp32_partitioned_groups_flat:
                flat.grad.fill_(torch.nan)
            self._refresh_norms()
        else:
            self._optimizer.grad_partitions_flat_buffer.fill_(torch.nan)

    def write_gradients(self) -> None:
        """Write edited fp32 copies back to a bf16 gradient buffer."""
        for item in self._slices:
            if item.name in self._edited_grads:
                target = self.gradient(item)
                assert target is not None
                target.copy_(self._edited_grads[item.name])
        self._edited_grads.clear()

    def freeze(self, decay: float) -> None:
        """Zero gradients of frozen elements, then decay what may move.

        Args:
            decay: Learning rate times weight decay of this step.
        """
        self.decay = decay
        for item in self._slices:
            grad = self.gradient(item)
            if grad is None or item.length == 0:
                continue
            mask = self.masks.get(item.name)
            if mask is not None:
                mask.zero_frozen_(grad)
            if item.name not in self._decayed or decay == 0.0:
                continue
            if mask is not None:
                mask.decay_(self.master(item), decay)
            else:
                self.master(item).mul_(1.0 - decay)
        if self.offloaded:
            self._refresh_norms()

    def _refresh_norms(self) -> None:
        # With offload DeepSpeed measured each slice when it copied it, before our edit.
        optimizer = self._optimizer
        for item in self._slices:
            grad = self.gradient(item)
            key = None if grad is None else optimizer.get_param_id(item.param)
            if key is not None:
                optimizer.norm_for_param_grads[key] = optimizer._constant_buffered_norm2(grad)

    def clear_gradients(self) -> None:
        """Zero the buffers after the step, so that no gradient serves twice."""
        self._optimizer.grad_partitions_flat_buffer.zero_()
        self._stepped = True
        if self.offloaded:
            for flat in self._optimizer.fp32_partitioned_groups_flat:
                flat.grad.zero_()

    # ---- after an edit of the master ----------------------------------------------------

    def write_params(self) -> None:
        """Carry edited masters to the working copy and to gathered copies.

        Collective: every rank must call it, outside forward and backward.
        """
        optimizer = self._optimizer
        self._edited_grads.clear()
        for index, flat in enumerate(optimizer.fp16_partitioned_groups_flat):
            flat.data.copy_(optimizer.fp32_partitioned_groups_flat[index].data)
            optimizer._unflatten_partitioned_parameters(index)
        self.refresh_gathered()

    def refresh_gathered(self) -> None:
        """Drop gathered copies and gather the persistent ones again from the slices.

        Collective: every rank must call it.
        """
        for item in self._slices:
            if item.param.ds_status.name == "AVAILABLE":
                item.param.partition()
        persistent = getattr(self._optimizer or self._engine.optimizer, "persistent_parameters", [])
        if persistent:
            persistent[0].all_gather(persistent)

"""Bytes and floating-point operations of code that runs on fake tensors."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
Parts = dict[str, int]
"""Bytes by what they are for."""


def _attention_products(name: str) -> int:
    """Return the matrix products ``T x T x D`` of a fused attention kernel; 0 for another op."""
    if not name.startswith(("_scaled_dot_product_", "_flash_attention_", "_efficient_attention_")):
        return 0
    # Backward: scores again, dV, dP, dQ, dK.
    return 5 if name.endswith("_backward") else 2


def _is_causal(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    for position, argument in enumerate(func._schema.arguments):
        if argument.name == "is_causal":
            given = args[position] if position < len(args) else argument.default_value
            return bool(kwargs.get("is_causal", given))
    return False


def count_flops(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> int:
    """Return the floating-point operations of one operator; 0 for what multiplies no matrices.

    Fused attention counts half of the score matrix where it is causal: kernels skip the rest.

    Args:
        func: Operator overload.
        args: Its arguments.
        kwargs: Its keyword arguments.
        out: What it returned.
    """
    packet = func._overloadpacket
    products = _attention_products(packet.__name__)
    if products:
        first = 1 if packet.__name__.endswith("_backward") else 0
        query, key = args[first].shape, args[first + 1].shape
        scores = query[0] * query[1] * query[2] * key[2]
        whole = products * 2 * scores * query[3]
        return int(whole // 2 if _is_causal(func, args, kwargs) else whole)
    if packet.__name__.endswith("_"):
        # Written in place (``addmm_``): the same arguments, counted under the plain name.
        packet = getattr(aten, packet.__name__.rstrip("_"), packet)
    if packet in flop_registry:
        return int(flop_registry[packet](*args, **kwargs, out_val=out))
    return 0


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows every storage from the operator that makes it to its end.

    Views and writes in place make nothing. Bytes are those the tensors ask for; an allocator that
    rounds (512 on CUDA) adds little.

    Args:
        label: Says for what an operator that runs now works.
        ignored: Tensors that exist already and are counted elsewhere.
    """

    def __init__(self, label: Callable[[], str], ignored: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._label = label
        self._known: dict[int, Any] = {t.untyped_storage()._cdata: t for t in ignored}
        self.live: Parts = {}
        self.total = 0
        self.flops = 0
        self._peak = 0
        self._peak_parts: Parts = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and look at what it returns."""
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default and args[0].dtype == torch.bool:
            # Code that asks whether all positions are targets, or all labels valid: take it so.
            return True
        out = func(*args, **kwargs)
        self.flops += count_flops(func, args, kwargs, out)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return out

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size, label = storage.nbytes(), self._label()
        self._known[key] = weakref.ref(storage, lambda _: self._forget(key, size, label))
        self.live[label] = self.live.get(label, 0) + size
        self.total += size
        if self.total > self._peak:
            self._peak, self._peak_parts = self.total, dict(self.live)

    def _forget(self, key: int, size: int, label: str) -> None:
        del self._known[key]
        self.live[label] -= size
        self.total -= size

    def take_peak(self) -> tuple[int, Parts]:
        """Return the largest total since the last call and its parts."""
        found = self._peak, self._peak_parts
        self._peak, self._peak_parts = self.total, dict(self.live)
        return found

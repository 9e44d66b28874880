"""Sums of squared inputs per feature, gathered by forward hooks.

Shape letters: B sequences, T positions, I input features.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from forgetscale.api import Batch


class InputStatistics:
    """Accumulate ``sum_t x_tj^2`` over real tokens for chosen modules, in fp32 and then fp64.

    Modules that read the same tensor (q, k, v; gate, up) share one computation. Hooks see whole
    activations, so nothing about ZeRO-3 matters here.

    Args:
        modules: Module name -> module.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.sums: dict[str, Tensor] = {}
        self.num_tokens = 0.0
        self._weight: Tensor | None = None
        self._last: tuple[Tensor, Tensor] | None = None
        self._handles = [
            module.register_forward_pre_hook(self._hook(name)) for name, module in modules.items()
        ]

    def start(self, batch: Batch) -> None:
        """Say which rows of the coming forward pass are real."""
        self._weight = batch.weight
        self._last = None
        self.num_tokens += float(batch.weight.sum()) * batch.input_ids.shape[1]

    def _hook(self, name: str) -> Any:
        def observe(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            x = inputs[0]
            assert isinstance(x, Tensor) and self._weight is not None
            if self._last is None or self._last[0] is not x:
                self._last = (x, self._sum_of_squares(x.detach()))
            total = self._last[1]
            if name in self.sums:
                self.sums[name] += total
            else:
                self.sums[name] = total.clone()

        return observe

    def _sum_of_squares(self, x: Tensor) -> Tensor:
        assert self._weight is not None
        norms: Tensor = torch.linalg.vector_norm(
            x, dim=tuple(range(1, x.dim() - 1)), dtype=torch.float32
        )
        weight = self._weight.to(norms.device, torch.float64)
        total: Tensor = (norms.double().square() * weight[:, None]).sum(0)
        return total

    def close(self) -> None:
        """Remove the hooks and forget the last activation."""
        for handle in self._handles:
            handle.remove()
        self._last = None


def flatten(values: Mapping[str, Tensor], names: Iterable[str]) -> Tensor:
    """Concatenate vectors by name, so that one all-reduce serves all of them."""
    return torch.cat([values[name].reshape(-1) for name in names])


def unflatten(flat: Tensor, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """Undo ``flatten``, given name -> length in the same order."""
    parts = torch.split(flat, list(sizes.values()))
    return dict(zip(sizes, parts, strict=True))

"""Second moments of what enters chosen layers on source data: forward passes alone.

Each rank adds up its own rows under hooks; sums travel once. As many layers as fit in the allowed
memory are taken in one pass over the data, the others in the next.

Shape letters: B rows, T positions, I in features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from forgetscale.api import Calibration
from forgetscale.config import CalibrationConfig
from forgetscale.errors import ConfigError, DataError
from forgetscale.masks import AdapterPair
from forgetscale.methods.grouping import groups_within


@dataclass(frozen=True, slots=True)
class InputMoment:
    """``E[a a^T]`` of one layer's inputs over the real positions of all ranks' rows."""

    pair: AdapterPair
    moment: Tensor
    """``[I, I]`` fp64, on the host."""


def _sizes(pairs: Sequence[AdapterPair], limit: int) -> Iterator[tuple[AdapterPair, int]]:
    for pair in pairs:
        size = 8 * pair.shape[1] ** 2
        if size > limit:
            raise ConfigError(
                f"method.calibration.max_statistics_bytes is {limit}, but the second moment of the"
                f" inputs of {pair.module} needs {size}; allow more memory."
            )
        yield pair, size


class _Products:
    """Hooks that add up ``a a^T`` of real positions."""

    def __init__(self) -> None:
        self.real: Tensor | None = None
        self.sums: dict[str, Tensor] = {}

    def hook(self, name: str) -> Any:
        """Return a forward hook of a layer."""

        def add(module: Any, inputs: tuple[Any, ...]) -> None:
            x = inputs[0]
            if not isinstance(x, Tensor) or self.real is None or x.shape[:2] != self.real.shape:
                raise DataError(
                    f"method.calibration: the input of {name} has shape"
                    f" {list(getattr(x, 'shape', ()))}, expected rows and positions first; leave"
                    " this layer out of adapter.target_modules."
                )
            # fp64: the weakest directions drown in the rounding of fp32 products.
            rows = x.detach()[self.real].double()
            product = rows.t() @ rows
            self.sums[name] = self.sums[name].add_(product) if name in self.sums else product

        return add


def input_moments(calibration: Calibration, source: CalibrationConfig) -> Iterator[InputMoment]:
    """Yield the second moment of every adapted layer's inputs, in the adapter's order.

    Args:
        calibration: The source model; its adapter says which layers.
        source: Data.

    Raises:
        ConfigError: Memory is too small for one layer.
        DataError: A layer sees something else than rows of positions.

    Collective: every rank must call it and take all of them.
    """
    sizes = _sizes(list(calibration.adapters.values()), source.max_statistics_bytes)
    for group in groups_within(sizes, source.max_statistics_bytes):
        modules = calibration.named_modules()
        products = _Products()
        handles = [
            modules[pair.module].register_forward_pre_hook(products.hook(pair.module))
            for pair in group
        ]
        tokens = torch.zeros(1, dtype=torch.float64)
        try:
            for item in calibration.labelled(source, sampled=False):
                products.real = item.real
                calibration.forward(item.batch)
                tokens += item.real.sum().double().cpu()
        finally:
            for handle in handles:
                handle.remove()
        reduce = calibration.shards().all_reduce_sum
        count = float(reduce(tokens))
        for pair in group:
            yield InputMoment(pair, reduce(products.sums.pop(pair.module)).cpu() / count)

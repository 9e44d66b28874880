"""Kronecker factors of the Fisher matrix: sums over tokens of what enters and leaves a layer.

``F ~ S (x) C`` with ``S = E[delta delta^T]`` of gradients at a layer's output and ``C = E[a a^T]``
of its inputs. Each rank adds up its own rows under hooks; no weight has a gradient. As many layers
as fit in the allowed memory are taken in one pass over the data, the others in the next.

Shape letters: B rows, T positions, O out features, I in features.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from forgetscale.api import Calibration, LabelledBatch
from forgetscale.config import CalibrationConfig
from forgetscale.errors import ConfigError, DataError
from forgetscale.methods.grouping import groups_within
from forgetscale.methods.ssu.gradients import Tap
from forgetscale.methods.ssu.targets import Target

Side = str
"""``left`` (outputs) or ``right`` (inputs)."""


@dataclass(frozen=True, slots=True)
class SideMoments:
    """What is known of one layer after the sum over ranks, in units of one row of text."""

    moments: Mapping[Side, Tensor]
    """Side -> ``[d, d]`` fp64: the Fisher matrix of a row, traced over the other side."""
    trace: float
    """Trace of the Fisher matrix of a row."""


class SideProducts:
    """Hooks that add up products of inputs and of output gradients of chosen layers.

    Args:
        modules: Module name -> linear layer.
        sides: Which products are wanted; of the other side only the trace is kept.
    """

    def __init__(self, modules: Mapping[str, nn.Module], sides: Iterable[Side]) -> None:
        self._sides = tuple(sides)
        self._real: Tensor | None = None
        self.sums: dict[tuple[str, str], Tensor] = {}
        # Before the hooks of ZeRO-3: in backward those then come first and gather the weights.
        self._handles = [
            module.register_forward_hook(self._hook(name), prepend=True)
            for name, module in modules.items()
        ]

    def start(self, item: LabelledBatch) -> None:
        """Say which positions of the coming pass are real."""
        self._real = item.real

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str) -> Any:
        def tap(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
            x = inputs[0]
            if not isinstance(x, Tensor) or self._real is None or x.shape[:2] != self._real.shape:
                raise DataError(
                    f"fisher: the input of {name} has shape {list(getattr(x, 'shape', ()))},"
                    " expected rows and positions first; leave this layer out of"
                    " method.target_modules."
                )
            return Tap.apply(output, x, partial(self._observe, name))  # type: ignore[no-untyped-call]

        return tap

    def _observe(self, name: str, x: Tensor, grad: Tensor) -> None:
        assert self._real is not None
        for side, value in (("left", grad), ("right", x)):
            rows = value[self._real].float()
            self._add((name, f"{side}_trace"), rows.double().square().sum().view(1))
            if side in self._sides:
                self._add((name, side), (rows.t() @ rows).double())

    def _add(self, key: tuple[str, str], value: Tensor) -> None:
        self.sums[key] = self.sums[key].add_(value) if key in self.sums else value


def side_groups(
    targets: Sequence[Target], sides: Sequence[Side], limit: int
) -> Iterator[list[Target]]:
    """Return groups of layers whose factors fit in a rank's memory together.

    Args:
        targets: Matrices of linear layers.
        sides: Which factors.
        limit: Bytes allowed.

    Raises:
        ConfigError: One layer alone does not fit.
    """

    def needed() -> Iterator[tuple[Target, int]]:
        for target in targets:
            height, width = target.shape
            size = 8 * (height**2 * ("left" in sides) + width**2 * ("right" in sides))
            if size > limit:
                raise ConfigError(
                    f"method.calibration.max_statistics_bytes allows {limit} bytes for one data"
                    f" set, but the Fisher factors of {target.name} alone need {size}; allow more"
                    " memory."
                )
            yield target, size

    return groups_within(needed(), limit)


def measure_sides(
    calibration: Calibration,
    targets: Sequence[Target],
    sides: Sequence[Side],
    source: CalibrationConfig,
    *,
    sampled: bool,
) -> dict[str, SideMoments]:
    """Measure the factors of some layers in one pass over some data; return them by weight.

    Args:
        calibration: Source model.
        targets: Matrices of linear layers, as many as fit in memory.
        sides: Which factors.
        source: Data.
        sampled: Draw labels from the model.

    Raises:
        DataError: A layer got no gradient.

    Collective: every rank must call it.
    """
    live = calibration.named_modules()
    products = SideProducts({t.module: live[t.module] for t in targets}, sides)
    num_rows = num_tokens = 0.0
    try:
        for item in calibration.labelled(source, sampled=sampled):
            products.start(item)
            calibration.backward(item.batch, item.labels, item.loss)
            num_rows += float(item.batch.weight.sum())
            num_tokens += float(item.real.sum())
    finally:
        products.close()
    reduce = calibration.shards().all_reduce_sum
    counts = reduce(torch.tensor([num_rows, num_tokens], dtype=torch.float64)).tolist()
    return {target.name: _reduced(products, target, sides, reduce, counts) for target in targets}


def _reduced(
    products: SideProducts,
    target: Target,
    sides: Sequence[Side],
    all_reduce: Any,
    counts: Sequence[float],
) -> SideMoments:
    if (target.module, "left_trace") not in products.sums:
        raise DataError(
            f"fisher: {target.module} got no gradient on the calibration data; leave it out of"
            " method.target_modules."
        )
    num_rows, num_tokens = counts
    traces = {
        side: float(all_reduce(products.sums[target.module, f"{side}_trace"]))
        for side in ("left", "right")
    }
    # Per token E[delta delta^T] (x) E[a a^T]; a row has the mean number of tokens of them.
    trace = traces["left"] * traces["right"] / num_tokens / num_rows
    moments = {}
    for side in sides:
        other = traces["right" if side == "left" else "left"]
        total = all_reduce(products.sums.pop((target.module, side)))
        moments[side] = total.mul_(other / num_tokens / num_rows)
    return SideMoments(moments, trace)

"""What is measured on source data: sums over the inputs of modules, gathered by forward hooks.

Shape letters: B sequences, T positions, I input features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from forgetscale.api import Batch, Calibration
from forgetscale.errors import ConfigError, DataError
from forgetscale.ops.importance import recent_block_weights


class Observer(Protocol):
    """Something with hooks that looks at every batch of a pass."""

    def start(self, batch: Batch) -> None:
        """Say which rows of the coming forward pass are real."""

    def close(self) -> None:
        """Remove the hooks."""


def run_pass(
    calibration: Calibration,
    observers: Sequence[Observer],
    run: Callable[[Batch], None] | None = None,
) -> None:
    """Run all source data through the model once, for all observers together.

    Args:
        calibration: Source of batches.
        observers: Their hooks are removed at the end, whatever happens.
        run: What is done with a batch; by default a forward pass.

    Collective: every rank must call it.
    """
    try:
        for batch in calibration.batches():
            for observer in observers:
                observer.start(batch)
            (run or calibration.forward)(batch)
    finally:
        for observer in observers:
            observer.close()


class _InputObserver(ABC):
    """Pre-forward hooks on modules; modules that read the same tensor are seen once.

    The hooks stand before those of ZeRO-3, which hand each module another view of a shared input.

    Args:
        modules: Module name -> module.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.owner: dict[str, str] = {}
        """Module name -> first module that reads the same tensor."""
        self.widths: dict[str, int] = {}
        self.batch: Batch | None = None
        # Weak: looking must not keep an activation alive.
        self._seen = WeakTensorKeyDictionary()
        self._handles = [
            module.register_forward_pre_hook(self._hook(name), prepend=True)
            for name, module in modules.items()
        ]

    def start(self, batch: Batch) -> None:
        """Say which rows of the coming forward pass are real."""
        self.batch = batch
        self._seen.clear()

    @abstractmethod
    def observe(self, name: str, x: Tensor, batch: Batch) -> None:
        """Take in the input ``[B, ..., I]`` of one module, shared by those it owns."""

    def _hook(self, name: str) -> Any:
        def look(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            x, batch = inputs[0], self.batch
            assert isinstance(x, Tensor) and batch is not None
            self.widths[name] = x.shape[-1]
            if x in self._seen:
                self.owner[name] = self._seen[x]
                return
            if x.shape[0] != batch.weight.shape[0]:
                raise DataError(
                    f"ssu: the input of {name} has shape {list(x.shape)}, expected one entry per"
                    f" row ({batch.weight.shape[0]}) first; this layer cannot be scored by"
                    " activations (use score mag_l1 or rand)."
                )
            self._seen[x] = self.owner[name] = name
            self.observe(name, x.detach(), batch)

        return look

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._seen.clear()
        self.batch = None

    def check(self, widths: Mapping[str, int]) -> None:
        """Check that every module ran, with the input width of its parameter.

        Args:
            widths: Module name -> columns of its parameter.

        Raises:
            DataError: One did not.
        """
        for name, width in widths.items():
            found = self.widths.get(name)
            if found != width:
                got = "never ran" if found is None else f"has input width {found}"
                raise DataError(
                    f"ssu: {name} {got} on the calibration data, expected input width {width};"
                    " this layer cannot be scored by activations (use score mag_l1 or rand)."
                )


class InputStatistics(_InputObserver):
    """Weighted sums of ``x_tj^2`` per module: all that the activation scores need, in one pass.

    Squares are summed in fp32 over the positions of a row, then in fp64 over rows, once with equal
    weights and once with those of ``recent_block_weights``.

    Args:
        modules: Module name -> module.
        num_blocks: Rows of the whole calibration.
    """

    def __init__(self, modules: Mapping[str, nn.Module], num_blocks: int) -> None:
        super().__init__(modules)
        self.sums: dict[str, Tensor] = {}
        """Owner -> ``[2, I]`` fp64: sum over tokens, and recent average of sums over positions."""
        self.num_rows = 0.0
        self.num_tokens = 0.0
        self._num_blocks = num_blocks
        self._weights: Tensor | None = None

    def start(self, batch: Batch) -> None:
        """Say which rows of the coming forward pass are real."""
        super().start(batch)
        weight = batch.weight.double()
        recent = recent_block_weights(batch.block, self._num_blocks)
        self._weights = torch.stack([weight, weight * recent])
        rows = float(weight.sum())
        self.num_rows += rows
        self.num_tokens += rows * batch.input_ids.shape[1]

    def observe(self, name: str, x: Tensor, batch: Batch) -> None:
        """Add the squares of one module's input."""
        assert self._weights is not None
        rows = x.reshape(x.shape[0], -1, x.shape[-1])
        squares = rows.float().square().sum(1).double()
        total = self._weights.to(squares.device) @ squares
        if name in self.sums:
            self.sums[name] += total
        else:
            self.sums[name] = total


class InputProducts(_InputObserver):
    """Sums of ``x x^T`` over real tokens, for as many modules as fit in memory.

    Which modules are taken is settled by the first batch; the others are left for another pass.
    Products are made in fp32 per batch and summed in fp64.

    Args:
        modules: Module name -> module.
        max_bytes: Memory for the sums of this pass.
    """

    def __init__(self, modules: Mapping[str, nn.Module], max_bytes: int) -> None:
        super().__init__(modules)
        self.sums: dict[str, Tensor] = {}
        """Owner -> ``[I, I]`` fp64."""
        self._max_bytes = max_bytes
        self._settled = False

    def start(self, batch: Batch) -> None:
        """Say which rows of the coming forward pass are real."""
        self._settled = bool(self.owner)
        super().start(batch)

    def observe(self, name: str, x: Tensor, batch: Batch) -> None:
        """Add the products of one module's input, if the module was taken."""
        width = x.shape[-1]
        if not self._settled:
            used = sum(found.numel() * found.element_size() for found in self.sums.values())
            if used + 8 * width**2 <= self._max_bytes:
                self.sums[name] = torch.zeros(width, width, dtype=torch.float64, device=x.device)
        if name in self.sums:
            weight = batch.weight.to(x.device).view(-1, *[1] * (x.dim() - 1))
            rows = (x.float() * weight).flatten(0, -2)
            self.sums[name] += rows.t() @ rows

    def left(self) -> set[str]:
        """Return the modules that wait for another pass.

        Raises:
            ConfigError: Not even one fitted.
        """
        if self.owner and not self.sums:
            name = next(iter(self.owner))
            raise ConfigError(
                f"method.calibration.max_statistics_bytes is {self._max_bytes}, but the inputs of"
                f" {name} alone need {8 * self.widths[name] ** 2}; allow more memory."
            )
        return {name for name, owner in self.owner.items() if owner not in self.sums}


def flatten(values: Mapping[str, Tensor], names: Iterable[str]) -> Tensor:
    """Concatenate vectors by name, so that one all-reduce serves all of them."""
    return torch.cat([values[name].reshape(-1) for name in names])


def unflatten(flat: Tensor, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """Undo ``flatten``, given name -> length in the same order."""
    parts = torch.split(flat, list(sizes.values()))
    return dict(zip(sizes, parts, strict=True))

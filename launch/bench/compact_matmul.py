"""Ways to multiply by a matrix that is cut into frozen and trainable columns.

One linear layer, forward and backward, half of the columns frozen; ratios of the time of the whole
layer (three matmuls). The limit is 5/6: two matmuls and half of the third. The winner on the device
at hand is what ``forgetscale.models.compact`` does (``transposed``); the losers stay here.

    python launch/bench/compact_matmul.py
    python launch/bench/compact_matmul.py --sizes 4096x4096x4096 4096x11008x4096
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from measure import keep
from torch import Tensor

DEFAULT_SIZES = (
    "1024x1024x1024",
    "1024x2752x1024",
    "1024x1024x2752",
    "2048x2048x2048",
    "4096x1024x1024",
)


class Layer:
    """Random operands of one size, and the ways to use them.

    Args:
        tokens: Rows of the input.
        out: Out features.
        width: In features; half of them are trainable.
        dtype: Type of everything.
        device: Where to compute.
    """

    def __init__(self, tokens: int, out: int, width: int, dtype: torch.dtype, device: str) -> None:
        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=dtype, device=device)

        order = torch.randperm(width, device=device)
        self.frozen_at = order[width // 2 :].sort().values
        self.moving_at = order[: width // 2].sort().values
        self.weight, self.x, self.grad = draw(out, width), draw(tokens, width), draw(tokens, out)
        self.frozen = self.weight[:, self.frozen_at].contiguous()
        self.moving = self.weight[:, self.moving_at].contiguous()
        self.frozen_t, self.moving_t = self.frozen.t().contiguous(), self.moving.t().contiguous()
        self.inverse = torch.empty_like(order)
        both = torch.cat([self.frozen_at, self.moving_at])
        self.inverse[both] = torch.arange(width, device=device)
        self.both = both

    def whole(self) -> Any:
        """Full fine-tuning."""
        return self.x @ self.weight.t(), self.grad @ self.weight, self.grad.t() @ self.x

    def limit(self) -> Any:
        """The matmuls alone, as if the parts were there for nothing."""
        kept = self.x[:, : self.moving_at.numel()]
        return self.x @ self.weight.t(), self.grad @ self.weight, self.grad.t() @ kept

    def _assemble(self) -> Tensor:
        whole = torch.empty_like(self.weight)
        whole.index_copy_(1, self.frozen_at, self.frozen)
        whole.index_copy_(1, self.moving_at, self.moving)
        return whole

    def row_major(self) -> Any:
        """Parts ``[O, P]``, assembled column by column, twice."""
        y = self.x @ self._assemble().t()
        kept = self.x.index_select(1, self.moving_at)
        return y, self.grad @ self._assemble(), self.grad.t() @ kept

    def _assemble_t(self) -> Tensor:
        whole = self.weight.new_empty(self.weight.shape[::-1])
        whole.index_copy_(0, self.frozen_at, self.frozen_t)
        whole.index_copy_(0, self.moving_at, self.moving_t)
        return whole

    def transposed(self) -> Any:
        """Parts ``[P, O]``, assembled by whole contiguous rows, twice."""
        y = self.x @ self._assemble_t()
        kept = self.x.index_select(1, self.moving_at)
        return y, self.grad @ self._assemble_t().t(), kept.t() @ self.grad

    def permuted(self) -> Any:
        """Parts side by side, the input permuted instead of the weight."""
        weight = torch.cat([self.frozen, self.moving], 1)
        x = self.x.index_select(1, self.both)
        y = x @ weight.t()
        kept = x[:, self.frozen_at.numel() :].contiguous()
        weight = torch.cat([self.frozen, self.moving], 1)
        return y, (self.grad @ weight).index_select(1, self.inverse), self.grad.t() @ kept

    def halves(self) -> Any:
        """Two half matmuls each way, nothing assembled."""
        kept, rest = self.x.index_select(1, self.moving_at), self.x.index_select(1, self.frozen_at)
        y = (kept @ self.moving.t()).addmm_(rest, self.frozen.t())
        x_grad = torch.empty_like(self.x)
        x_grad.index_copy_(1, self.frozen_at, self.grad @ self.frozen)
        x_grad.index_copy_(1, self.moving_at, self.grad @ self.moving)
        return y, x_grad, self.grad.t() @ kept


def check(layer: Layer, way: Callable[[], Any]) -> None:
    """Check that a way computes the right thing."""
    y, x_grad, weight_grad = way()
    expected = layer.whole()
    if weight_grad.shape[0] != layer.weight.shape[0]:
        weight_grad = weight_grad.t()
    wanted = (expected[0], expected[1], expected[2][:, layer.moving_at])
    for found, want in zip((y, x_grad, weight_grad), wanted, strict=True):
        error = (found.float() - want.float()).norm() / want.float().norm()
        assert error < 2e-2, (way.__name__, float(error))


def measure(layer: Layer, turns: int) -> dict[str, float]:
    """Return the median time of each way over that of the whole layer, in turn."""
    ways = ("whole", "limit", "row_major", "transposed", "permuted", "halves")
    for name in ways[2:]:
        check(layer, getattr(layer, name))
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(turns + 2):
        for name in ways:
            start = time.perf_counter()
            getattr(layer, name)()
            if layer.x.is_cuda:
                torch.cuda.synchronize()
            if turn >= 2:
                seconds[name].append(time.perf_counter() - start)
    base = statistics.median(seconds["whole"])
    return {name: round(statistics.median(values) / base, 3) for name, values in seconds.items()}


def main() -> None:
    """Measure and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", default=DEFAULT_SIZES, metavar="TOKENSxOUTxIN")
    parser.add_argument("--turns", type=int, default=9)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    found: dict[str, dict[str, float]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        for size in options.sizes:
            layer = Layer(*map(int, size.split("x")), dtype, device)
            found[f"{size} {str(dtype).removeprefix('torch.')}"] = measure(layer, options.turns)
    keep(f"compact_matmul-{device}", {"ratio_to_whole": found, "turns": options.turns})


if __name__ == "__main__":
    main()

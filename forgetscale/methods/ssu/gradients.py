"""Fisher information per column: squared gradients of one block's loss, summed, never whole.

ZeRO-3 reduces gradients over ranks, which would mix the blocks before they are squared. So no
gradient of a parameter is asked for at all: each rank runs its own blocks, hooks keep a module's
input and see the gradient of its output, and form ``dW = dY^T X`` of one module and one block at a
time, in fp32, square it, add up its columns and drop it. That is exact, costs what a training step
costs, keeps all ranks at work on different blocks, and needs memory for one ``dW``.

Shape letters: B sequences, T positions, O out features, I in features.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from forgetscale.api import Batch, Calibration
from forgetscale.errors import DataError
from forgetscale.methods.ssu.statistics import flatten, run_pass, unflatten
from forgetscale.methods.ssu.targets import Target
from forgetscale.ops import IGNORE_INDEX
from forgetscale.ops.losses import cross_entropy, sampled_cross_entropy, uniform_numbers

Observe = Callable[[Tensor, Tensor], None]


class Tap(torch.autograd.Function):
    """Identity on a module's output that shows the output's gradient together with the input.

    The input is saved as any operation saves one: layers that recompute drop it and bring it back.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, observe: Observe) -> Tensor:
        """Keep the input for backward."""
        ctx.save_for_backward(x)
        ctx.observe = observe
        return output.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Show input and gradient; pass the gradient on."""
        (x,) = ctx.saved_tensors
        ctx.observe(x.detach(), grads[0])
        return grads[0], None, None


class GradientSquares:
    """Sums over blocks of squared gradients, added up per column, of chosen parameters.

    Args:
        modules: Module name -> module.
        targets: Parameters; every one belongs to one of the modules.
    """

    def __init__(self, modules: Mapping[str, nn.Module], targets: list[Target]) -> None:
        self.sums: dict[str, Tensor] = {}
        """Parameter name -> ``[columns]`` fp64."""
        self.num_rows = 0.0
        self._batch_size = 0
        self._names: dict[str, list[str]] = {}
        for target in targets:
            self._names.setdefault(target.module, []).append(target.name)
        # Before the hooks of ZeRO-3: in backward those then come first and gather the weights.
        self._handles = [
            modules[name].register_forward_hook(self._hook(name), prepend=True)
            for name in self._names
        ]

    def start(self, batch: Batch) -> None:
        """Count the real rows of the coming pass."""
        self.num_rows += float(batch.weight.sum())
        self._batch_size = batch.weight.shape[0]

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str) -> Any:
        def tap(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
            x = inputs[0]
            assert isinstance(x, Tensor) and isinstance(output, Tensor)
            if x.shape[0] != self._batch_size:
                raise DataError(
                    f"ssu: the input of {name} has shape {list(x.shape)}, expected one entry per"
                    f" row ({self._batch_size}) first; this layer cannot be scored by fisher (use"
                    " score mag_l1 or rand)."
                )
            observe = partial(self._observe, name, module)
            return Tap.apply(output, x, observe)  # type: ignore[no-untyped-call]

        return tap

    def _observe(self, name: str, module: nn.Module, x: Tensor, grad: Tensor) -> None:
        """Add the squares of one module, block by block; rows without loss add zero."""
        gradients = _linear_gradients if isinstance(module, nn.Linear) else _vector_gradients
        for row in range(x.shape[0]):
            found = gradients(module, x[row : row + 1].float(), grad[row : row + 1].float())
            for parameter in self._names[name]:
                value = found[parameter.rpartition(".")[2]]
                columns = torch.linalg.vector_norm(value.view(-1, value.shape[-1]), dim=0)
                square = columns.double().square()
                self.sums[parameter] = self.sums.get(parameter, torch.zeros_like(square)) + square


def _linear_gradients(module: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Return the gradients of a linear layer, given input ``[1, T, I]`` and ``[1, T, O]``."""
    flat = grad.flatten(0, -2)
    return {"weight": flat.t() @ x.flatten(0, -2), "bias": flat.sum(0)}


def _vector_gradients(module: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Return the gradients of a module with vectors only, by running a copy that owns fp32 ones."""
    own = copy.copy(module)
    copies = {
        leaf: None if value is None else nn.Parameter(value.detach().float())
        for leaf, value in module._parameters.items()
    }
    own.__dict__["_parameters"] = copies
    used = {leaf: value for leaf, value in copies.items() if value is not None}
    with torch.enable_grad():
        # Not a call: the hooks of the original, ZeRO-3's among them, are not for the copy.
        output = own.forward(x)
    return dict(zip(used, torch.autograd.grad(output, list(used.values()), grad), strict=True))


def backward_batch(calibration: Calibration, sampled: bool, batch: Batch) -> None:
    """Carry the gradient of every block's summed loss back through the model.

    Args:
        calibration: The source model.
        sampled: Whether labels are drawn from the model.
        batch: Rows.

    Collective: every rank must call it.
    """
    ignored = (batch.weight == 0)[:, None]
    ids = batch.input_ids
    if not sampled:
        calibration.backward(batch, ids.masked_fill(ignored, IGNORE_INDEX), cross_entropy)
        return
    numbers = [uniform_numbers(calibration.seed, b, ids.shape[1]) for b in batch.block.tolist()]
    places = torch.arange(ids.numel(), device=ids.device).view_as(ids)
    loss = sampled_cross_entropy(torch.cat(numbers).to(ids.device))
    calibration.backward(batch, places.masked_fill(ignored, IGNORE_INDEX), loss)


def fisher_columns(
    calibration: Calibration, targets: list[Target], *, sampled: bool
) -> dict[str, Tensor]:
    """Return ``sum_i F_ij`` of every parameter, ``F = (1/n) sum_blocks (dL_block/dW)^2``, in fp64.

    ``L_block`` is the mean negative log-likelihood of one block's tokens. With labels of the data
    this is the empirical Fisher on the level of blocks. With sampled labels gradients of different
    positions are uncorrelated, so the square of the block's gradient has the expectation of the
    sum of squares over its tokens: the true Fisher, up to the constant ``1 / (T - 1)^2``.

    Args:
        calibration: Source of batches and gradients.
        targets: Parameters to score.
        sampled: Draw labels from the model (seeded by run seed, block and position), else take
            the next tokens of the text.

    Raises:
        DataError: A module never ran, blocks hold less than two tokens, or there is none.

    Collective: every rank must call it.

    Source:
        arXiv:2512.04844 and its code (true labels, blocks of 2,048). The sampled form is the
        Fisher information proper (arXiv:1905.12558 on the difference).
    """
    squares = GradientSquares(calibration.named_modules(), targets)
    length = 0

    def run(batch: Batch) -> None:
        nonlocal length
        length = batch.input_ids.shape[1]
        backward_batch(calibration, sampled, batch)

    run_pass(calibration, [squares], run)
    for target in targets:
        if target.name not in squares.sums:
            raise DataError(
                f"ssu: {target.name} got no gradient on the calibration data, so score fisher does"
                " not know it (use score mag_l1 or rand)."
            )
    widths = {target.name: target.width for target in targets}
    shards = calibration.shards()
    total = shards.all_reduce_sum(flatten(squares.sums, widths))
    num_rows = float(shards.all_reduce_sum(torch.tensor([squares.num_rows], dtype=torch.float64)))
    if num_rows == 0 or length < 2:
        raise DataError(
            "ssu: the calibration data holds no token with a prediction; check"
            " method.calibration.path."
        )
    return unflatten(total / (num_rows * (length - 1) ** 2), widths)

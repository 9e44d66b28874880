"""Anchors, and what is done with metrics and projectors: penalise, shrink, project, all at once.

A ``Guard`` is one matrix: where its slice lies, what changes are measured from, and a metric or a
projector. The functions here take the guards of all matrices, so that one sum over ranks serves
them together, and edit slices in place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from forgetscale.projections.frames import AllReduce, Place
from forgetscale.projections.metrics import FrameMetric, Metric
from forgetscale.projections.projectors import Onto, Projector

BUCKET_FLOATS = 2**26
"""Numbers summed over ranks at one time."""


class Anchor:
    """What changes are measured from: reference weights, or nothing where weights are a change.

    Args:
        values: ``[S]`` reference in any type (the source model's, 2 bytes a weight at bf16); None
            for adapters, which start at no change.
    """

    def __init__(self, values: Tensor | None = None) -> None:
        self.values = values

    def change(self, param: Tensor) -> Tensor:
        """Return the change of a slice, a new tensor in the parameter's type."""
        return param.clone() if self.values is None else param - self.values.to(param)

    def put_(self, param: Tensor, change: Tensor) -> None:
        """Set a slice to the anchor plus a change."""
        param.copy_(change if self.values is None else self.values.to(change) + change)

    def move_(self, param: Tensor) -> None:
        """Measure from here on (online EWC, Lisa)."""
        self.values = param.clone() if self.values is None else param.to(self.values)


@dataclass(slots=True)
class Guard:
    """One protected matrix on this rank."""

    name: str
    place: Place
    anchor: Anchor
    metric: Metric | None = None
    projector: Projector | None = None

    @property
    def _shares(self) -> bool:
        """True if metric and projector look through one frame, whose sketch serves both."""
        return (
            isinstance(self.metric, FrameMetric)
            and isinstance(self.projector, Onto)
            and self.metric.frame is self.projector.frame
        )

    @property
    def sizes(self) -> tuple[int, int]:
        """Numbers that metric and projector send; a frame that serves both is sent once."""
        metric = 0 if self.metric is None else self.metric.communication.floats
        projector = 0 if self.projector is None else self.projector.communication.floats
        return metric, 0 if self._shares else projector

    @property
    def floats(self) -> int:
        """Numbers that one look sums over ranks, the norm of the change included."""
        return sum(self.sizes) + 1

    def sketch(self, x: Tensor) -> Tensor:
        """Return this rank's part of everything that is summed, ``[floats]``."""
        parts = [part.sketch(x) for part in (self.metric, self.projector) if part is not None]
        if self._shares:
            parts.pop()
        return torch.cat([*parts, x.square().sum().view(1)])

    def look(self, total: Tensor) -> Look:
        """Return what the sum of all ranks' sketches tells."""
        of_metric, of_projector, square = torch.split(total, [*self.sizes, 1])
        if self._shares:
            assert self.projector is not None
            of_projector = of_metric[: self.projector.communication.floats]
        return Look(self, of_metric, of_projector, square[0])


class Look(NamedTuple):
    """What is known of one matrix's change after the sum over ranks."""

    guard: Guard
    of_metric: Tensor
    of_projector: Tensor
    square: Tensor
    """``||x||^2`` of the whole matrix, ``[]``."""


def _buckets(guards: Sequence[Guard]) -> Iterator[list[Guard]]:
    bucket: list[Guard] = []
    size = 0
    for guard in guards:
        if bucket and size + guard.floats > BUCKET_FLOATS:
            yield bucket
            bucket, size = [], 0
        bucket.append(guard)
        size += guard.floats
    if bucket:
        yield bucket


def look(
    guards: Sequence[Guard], params: Mapping[str, Tensor], all_reduce: AllReduce
) -> Iterator[Look]:
    """Measure the changes of all guarded matrices; the sums of a bucket travel together.

    Args:
        guards: All of them, in the same order on every rank.
        params: This rank's slices.
        all_reduce: Sum over ranks.

    Collective: every rank must call it, and take all that it yields.
    """
    for bucket in _buckets(guards):
        parts = [guard.sketch(guard.anchor.change(params[guard.name])) for guard in bucket]
        total = all_reduce(torch.cat(parts))
        shares = torch.split(total, [guard.floats for guard in bucket])
        yield from (guard.look(share) for guard, share in zip(bucket, shares, strict=True))


class Report(NamedTuple):
    """Sums over all guarded matrices and ranks."""

    value: float = 0.0
    """Penalty ``x^T M x``."""
    leak: float = 0.0
    """``||P x|| / ||x||``; 0 without a projector."""
    norm: float = 0.0
    """``||x||``."""
    pull: float = 0.0
    """Norm of the penalty's gradient; 0 where none was added."""
    task_pull: float = 0.0
    """Norm of the task's gradient over the guarded matrices; 0 where none was looked at."""


class _Sums:
    """Running sums that stay on the device until all matrices are done."""

    def __init__(self) -> None:
        self._found: list[list[Tensor]] = []

    def add(self, found: Look) -> None:
        guard, zero = found.guard, torch.zeros_like(found.square)
        value = zero if guard.metric is None else guard.metric.value(found.of_metric)
        inside = zero
        if guard.projector is not None:
            inside = guard.projector.energy(found.of_projector, found.square)
        self._found.append([value, inside, found.square])

    def report(self) -> Report:
        if not self._found:
            return Report()
        table = torch.stack([torch.stack(row) for row in self._found]).double().sum(0)
        value, inside, square = table.tolist()
        leak = (max(inside, 0.0) / square) ** 0.5 if square > 0 else 0.0
        return Report(value, leak, square**0.5)


def add_penalty_(
    guards: Sequence[Guard],
    params: Mapping[str, Tensor],
    grads: Mapping[str, Tensor],
    all_reduce: AllReduce,
) -> Report:
    """Add the gradient of the penalty to reduced gradients, once a step and on every slice alone.

    Args:
        guards: Matrices with a metric.
        params: This rank's slices, not changed.
        grads: This rank's slices of the reduced gradients, fp32, changed in place.
        all_reduce: Sum over ranks.

    Collective: every rank must call it.
    """
    sums = _Sums()
    squares = torch.zeros(2, dtype=torch.float64)
    for found in look(guards, params, all_reduce):
        guard = found.guard
        assert guard.metric is not None
        grad = grads[guard.name]
        pull = guard.metric.gradient(guard.anchor.change(params[guard.name]), found.of_metric)
        squares = squares.to(grad.device)
        squares += torch.stack([pull.square().sum(), grad.square().sum()]).double()
        grad.add_(pull)
        sums.add(found)
    pull_norm, task_norm = all_reduce(squares).sqrt().tolist()
    return sums.report()._replace(pull=pull_norm, task_pull=task_norm)


def shrink_(
    guards: Sequence[Guard],
    params: Mapping[str, Tensor],
    all_reduce: AllReduce,
    step: float,
) -> Report:
    """Take the proximal step of the penalty: exact for the quadratic, stable for any strength.

    Args:
        guards: Matrices with a metric.
        params: This rank's slices, changed in place.
        all_reduce: Sum over ranks.
        step: ``h``, the learning rate, >= 0.

    Returns:
        What was found before the step.

    Collective: every rank must call it.
    """
    sums = _Sums()
    for found in look(guards, params, all_reduce):
        guard = found.guard
        assert guard.metric is not None
        x = guard.anchor.change(params[guard.name])
        guard.anchor.put_(params[guard.name], guard.metric.prox(x, found.of_metric, step))
        sums.add(found)
    return sums.report()


def project_(
    guards: Sequence[Guard], params: Mapping[str, Tensor], all_reduce: AllReduce
) -> Report:
    """Take out of every change the part inside its guard's projector.

    The change is measured from the anchor, so what rounding leaves in one step is taken out in the
    next, and decay toward zero cannot leak either.

    Args:
        guards: Matrices with a projector onto what must not move.
        params: This rank's slices, changed in place.
        all_reduce: Sum over ranks.

    Returns:
        What was found before the projection: what the optimizer's step would have leaked.

    Collective: every rank must call it.
    """
    sums = _Sums()
    for found in look(guards, params, all_reduce):
        guard = found.guard
        assert guard.projector is not None
        x = guard.anchor.change(params[guard.name])
        params[guard.name].sub_(guard.projector.apply(x, found.of_projector))
        sums.add(found)
    return sums.report()


def measure(guards: Sequence[Guard], params: Mapping[str, Tensor], all_reduce: AllReduce) -> Report:
    """Return the report alone. Collective: every rank must call it.

    Args:
        guards: All guards.
        params: This rank's slices.
        all_reduce: Sum over ranks.
    """
    sums = _Sums()
    for found in look(guards, params, all_reduce):
        sums.add(found)
    return sums.report()


def floats_per_step(guards: Sequence[Guard]) -> int:
    """Return the numbers that one look at all guards sums over ranks."""
    return sum(guard.floats for guard in guards)

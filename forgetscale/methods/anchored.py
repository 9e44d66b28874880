"""Methods that hold weights near their source: one code path, told apart by their guards.

A method of this family names, for every matrix it holds, an anchor, a metric or a projector (see
``forgetscale.projections``), and one of three actions:

- ``penalty``: the gradient of ``x^T M x`` is added to the reduced gradients, once a step, before
  the norm is taken, in closed form on slices;
- ``prox``: after the optimizer's step the change is shrunk to the exact minimiser of the quadratic
  with step ``lr``; stable for any strength;
- ``project_update``: after the optimizer's step the change loses its part inside the projector.
  Projecting the gradient instead does not confine Adam's update, so it is not offered.

Slices of the source weights are kept in the model's type (2 bytes a weight at bf16), read from the
model folder; they are no part of checkpoints.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from forgetscale.api import Calibration, ParamShard, ShardSet, Unprotected
from forgetscale.errors import ConfigError
from forgetscale.projections import (
    Anchor,
    Guard,
    Metric,
    Place,
    Projector,
    Report,
    add_penalty_,
    floats_per_step,
    project_,
    shrink_,
)

MAX_CURVATURE_STEP = 2.0
"""A gradient step ``h`` on a quadratic of curvature ``k`` diverges where ``h k`` exceeds this."""


class Anchored(Unprotected, ABC):
    """Hold chosen weights near their source values.

    Args:
        action: ``penalty``, ``prox`` or ``project_update``.
    """

    def __init__(self, action: str) -> None:
        self._action = action
        self._names: tuple[str, ...] = ()
        self._read: Callable[[str, int, int], Tensor] | None = None
        self._guards: list[Guard] | None = None
        self._report = Report()
        self._peak_lr = 0.0

    @abstractmethod
    def held(self, calibration: Calibration) -> Sequence[str]:
        """Return the weights that are held, and settle what is known of them. Collective."""

    @abstractmethod
    def guard(
        self, place: Place, name: str, anchor: Anchor, shards: ShardSet
    ) -> tuple[Metric | None, Projector | None]:
        """Return metric and projector of one weight's slice. Collective."""

    def prepare(self, calibration: Calibration) -> None:
        """Settle what is held; there is no freeze plan."""
        self._names = tuple(self.held(calibration))
        self._read = calibration.read_source
        self._peak_lr = calibration.peak_lr

    # ---- guards of this rank's slices ---------------------------------------------------

    def _settle(self, shards: ShardSet) -> list[Guard]:
        """Return the guards, made when slices are first seen. Collective."""
        if self._guards is None:
            assert self._read is not None, "prepare comes first"
            wanted = set(self._names)
            self._guards = [
                self._make(shard, shards)
                for shard in shards
                if shard.name in wanted and shard.grad is not None
            ]
            if self._action == "penalty":
                self._require_stable(shards)
        return self._guards

    def forget_guards(self) -> None:
        """Make all guards anew at the next step, from what is known by then."""
        self._guards = None

    def _make(self, shard: ParamShard, shards: ShardSet) -> Guard:
        assert self._read is not None
        place = Place(shard.shape, shard.start, shard.param.numel())
        values = self._read(shard.name, place.start, place.length)
        anchor = Anchor(values.to(shard.param.device))
        metric, projector = self.guard(place, shard.name, anchor, shards)
        return Guard(shard.name, place, anchor, metric, projector)

    def _require_stable(self, shards: ShardSet) -> None:
        assert self._guards is not None
        largest = max((g.metric.largest for g in self._guards if g.metric is not None), default=0.0)
        # No maximum over ranks is at hand; a sum of one number per rank is.
        found = torch.zeros(shards.size, dtype=torch.float64)
        found[shards.rank] = largest
        largest = float(shards.all_reduce_sum(found).max())
        reach = self._peak_lr * 2 * largest
        if reach > MAX_CURVATURE_STEP:
            limit = MAX_CURVATURE_STEP / (2 * self._peak_lr * largest)
            raise ConfigError(
                f"method.strength: the penalty's largest curvature times optim.lr is {reach:.3g},"
                f" and above {MAX_CURVATURE_STEP:g} a gradient step on it overshoots; use"
                " method.action: prox, which is stable for any strength, or multiply the strength"
                f" by less than {limit:.3g}."
            )

    # ---- the step -----------------------------------------------------------------------

    def transform_gradients(self, shards: ShardSet, step: int) -> None:
        """Add the penalty's gradient (action ``penalty``). Collective."""
        if self._action != "penalty":
            return
        guards = self._settle(shards)
        slices = self._slices(shards)
        params = {name: shard.param for name, shard in slices.items()}
        grads = {name: shard.grad for name, shard in slices.items() if shard.grad is not None}
        self._report = add_penalty_(guards, params, grads, shards.all_reduce_sum)

    def after_step(self, shards: ShardSet, step: int) -> Mapping[str, float]:
        """Shrink or project the change; return what was found. Collective."""
        guards = self._settle(shards)
        if self._action != "penalty":
            params = {name: shard.param for name, shard in self._slices(shards).items()}
            if self._action == "prox":
                self._report = shrink_(guards, params, shards.all_reduce_sum, shards.lr)
            else:
                self._report = project_(guards, params, shards.all_reduce_sum)
        report = self._report
        found = {"penalty": report.value, "change_norm": report.norm}
        if any(guard.projector is not None for guard in guards):
            found["leak"] = report.leak
        if self._action == "penalty":
            found |= {"penalty_grad_norm": report.pull, "task_grad_norm": report.task_pull}
        found["reduced_bytes"] = 4.0 * floats_per_step(guards)
        return found

    def _slices(self, shards: ShardSet) -> dict[str, ParamShard]:
        wanted = set(self._names)
        return {shard.name: shard for shard in shards if shard.name in wanted}

    # ---- state --------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return what identifies the protection; anchors and bases are on disk."""
        return {"held": list(self._names), **self.identity()}

    def identity(self) -> dict[str, Any]:
        """Return hashes of what the protection was made from."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Check that a checkpoint was made under the same protection.

        Raises:
            ConfigError: It was not.
        """
        require_same_state(state, self.state_dict())


def require_same_state(state: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that was made under another protection.

    Args:
        state: What the checkpoint holds.
        mine: What this run's protection is made of.

    Raises:
        ConfigError: They differ.
    """
    for key in sorted({*state, *mine}):
        if state.get(key) != mine.get(key):
            raise ConfigError(
                f"the checkpoint was made with another {key} of the protection"
                f" ({str(state.get(key))[:40]}) than this run's ({str(mine.get(key))[:40]});"
                " put it back or start a new run.output_dir."
            )

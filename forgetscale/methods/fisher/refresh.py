"""The Fisher basis a method goes by: measured at the source weights, refreshed while it trains.

A refreshed basis is a file of its own in the run folder, named by its step; a checkpoint holds its
hash. It cannot be recomputed at a resume, because the weights it was measured at are gone by then,
and it is too large to lie in every checkpoint between two estimates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from forgetscale.api import Calibration
from forgetscale.errors import ConfigError
from forgetscale.methods.fisher.measure import add_earlier, measure_basis, settings_of
from forgetscale.ops.refresh import merge_weights
from forgetscale.projections.basis import FisherBasis, MeasuredBasis

AllReduce = Callable[[Tensor], Tensor]
BLOCK = 2**20
REFRESHED = "refreshed"


class KnownFisher:
    """First and current basis of a method.

    Args:
        config: Recipe section with ``basis``, ``calibration``, ``fisher`` and ``refresh``.
        needed: Parts the method needs.
    """

    def __init__(self, config: Any, needed: Sequence[str]) -> None:
        self._config = config
        self._needed = list(needed)
        self._first: FisherBasis | None = None
        self._basis: FisherBasis | None = None
        self._reopen: Callable[[int, str], FisherBasis] | None = None
        self._step = 0

    @property
    def basis(self) -> FisherBasis:
        """The basis to go by."""
        assert self._basis is not None, "prepare comes first"
        return self._basis

    @property
    def first_hash(self) -> str:
        """Hash of the first basis."""
        return "" if self._first is None else self._first.self_hash

    @property
    def every(self) -> int | None:
        """Steps between two estimates, None for one alone."""
        return None if self._config.refresh is None else self._config.refresh.steps

    def _settings(self) -> dict[str, Any]:
        config = self._config
        return settings_of(config.fisher, self._needed, config.target_modules)

    def _measure(self, calibration: Calibration, source: Any) -> MeasuredBasis:
        assert source is not None, "the recipe's check asks for data or a basis"
        config = self._config
        return measure_basis(
            calibration, config.fisher, source, self._needed, config.target_modules
        )

    def prepare(self, calibration: Calibration) -> None:
        """Settle the first basis. Collective: every rank must call it."""
        config = self._config
        previous = getattr(config, "previous", None)

        def measure() -> MeasuredBasis:
            found = self._measure(calibration, config.calibration)
            if previous is not None:
                add_earlier(found, FisherBasis(previous), config.gamma)
            return found

        self._first = calibration.settle_basis(config.basis, self._settings(), measure)
        self._basis = self._first
        self._reopen = calibration.open_refreshed

    def refresh(self, calibration: Calibration, step: int) -> None:
        """Measure at the weights of the moment and merge. Collective: every rank must call it.

        Args:
            calibration: View of the live weights.
            step: Optimizer steps done.
        """
        first = self._first
        assert first is not None, "prepare comes first"

        def measure() -> MeasuredBasis:
            config = self._config
            found = self._measure(calibration, config.refresh.calibration or config.calibration)
            reduce = calibration.shards().all_reduce_sum
            merge_(found, first, config.fisher.max_rank, reduce)
            found.payload[REFRESHED] = {"step": step, "first": first.self_hash}
            return found

        self._basis = calibration.settle_basis(None, self._settings(), measure)
        self._step = step

    def state(self) -> dict[str, Any]:
        """Return which refreshed basis is in use, for a checkpoint; {} for the first one."""
        if self._step == 0:
            return {}
        return {REFRESHED: {"step": self._step, "self_hash": self.basis.self_hash}}

    def load(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Open the basis a checkpoint names; return the rest of its state.

        Raises:
            ConfigError: It was refreshed, and this run does not refresh.
            DataError: The basis is gone or damaged.

        Collective: every rank must call it.
        """
        rest = dict(state)
        found = rest.pop(REFRESHED, None)
        self._basis, self._step = self._first, 0
        if found is None:
            return rest
        if self.every is None:
            raise ConfigError(
                f"the checkpoint goes by a Fisher basis refreshed at step {found['step']}, but the"
                " recipe has no method.refresh; put it back or start a new run.output_dir."
            )
        assert self._reopen is not None, "prepare comes first"
        self._basis = self._reopen(found["step"], found["self_hash"])
        self._step = found["step"]
        return rest


def merge_(
    measured: MeasuredBasis, first: FisherBasis, most_added: int, all_reduce: AllReduce
) -> None:
    """Turn what was measured into its mean with a first basis, in place.

    Values stay in the units of a row of text; the scale stays the first one's, so that strengths
    mean the same all along.

    Args:
        measured: This rank's share of the new estimate.
        first: The first basis.
        most_added: Most directions of a matrix beside the first ones.
        all_reduce: Sum over ranks.

    Collective: every rank must call it.
    """
    for key, (start, values) in list(measured.slices.items()):
        kind, _, name = key.partition("/")
        old = first.read(kind, name, start, len(values)).to(values)
        if kind == "diagonal":
            merged = (values + first.scale(kind) * old) / 2
        else:
            cross = torch.zeros(old.shape[1], values.shape[1], dtype=torch.float64)
            for low in range(0, len(values), BLOCK):
                part = slice(low, low + BLOCK)
                cross += old[part].double().t() @ values[part].double()
            weights = _merge_values(measured, first, kind, name, all_reduce(cross), most_added)
            merged = _combine(old, values, weights)
        measured.slices[key] = start, merged
    for key in [key for key in measured.whole if key.partition("/")[0] in ("left", "right")]:
        kind, _, name = key.partition("/")
        old, new = first.side(kind, name), measured.whole[key]
        cross = old.double().t() @ new.double()
        weights = _merge_values(measured, first, kind, name, cross, most_added)
        measured.whole[key] = _combine(old, new, weights)
    scales = measured.payload["scale"]
    measured.payload["scale"] = {kind: first.scale(kind) for kind in scales}


def _combine(old: Tensor, new: Tensor, weights: Tensor) -> Tensor:
    found = torch.empty(len(old), weights.shape[1])
    for low in range(0, len(old), BLOCK):
        part = slice(low, low + BLOCK)
        both = torch.cat([old[part], new[part]], 1).double()
        found[part] = (both @ weights).float()
    return found


def _merge_values(
    measured: MeasuredBasis,
    first: FisherBasis,
    kind: str,
    name: str,
    cross: Tensor,
    most_added: int,
) -> Tensor:
    """Merge eigenvalues and traces; return the weights of the directions."""
    scale = first.scale(kind)
    key, trace = f"values/{kind}/{name}", f"trace/{kind}/{name}"
    old = scale * first.values(kind, name).double()
    weights, values = merge_weights(cross, old, measured.whole[key].double(), most_added=most_added)
    measured.whole[key] = values.float()
    measured.whole[trace] = (measured.whole[trace] + scale * first.trace(kind, name)) / 2
    return weights

"""L2-SP, EWC, online EWC, AlignGuard on full weights, OSF: which metric or projector each takes.

| kind | anchor | metric | projector | communication a step and matrix |
|---|---|---|---|---|
| ``l2_sp`` | source | identity | - | sums for reports |
| ``ewc``, ``online_ewc`` | source | diagonal Fisher | - | sums for reports |
| ``alignguard`` | source | low rank, ridge outside | vector, left, right, two-sided or mask | m;
m x I; m per cut row; m x k; a sum |
| ``osf`` | source | - | two-sided, leading triples of the weight | m x I and cut rows |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from forgetscale.api import Calibration, ShardSet
from forgetscale.config import (
    STRUCTURES_OF,
    AlignguardMethodConfig,
    EwcMethodConfig,
    L2SpMethodConfig,
    OsfMethodConfig,
)
from forgetscale.masks import Segment, find_cuts
from forgetscale.methods.anchored import Anchored, require_same_state
from forgetscale.methods.fisher.refresh import KnownFisher
from forgetscale.methods.fisher.targets import held_names, match_targets
from forgetscale.methods.leading import leading_directions
from forgetscale.ops.importance import num_frozen as floor_share
from forgetscale.projections import (
    Anchor,
    Complement,
    DiagonalMetric,
    Frame,
    FrameMetric,
    IdentityMetric,
    LeftFrame,
    MaskFrame,
    Metric,
    Onto,
    Place,
    Projector,
    RightFrame,
    TwoSidedComplement,
    TwoSidedFrame,
    VectorFrame,
    find_cut_rows,
)
from forgetscale.projections.basis import FisherBasis


class L2Sp(Anchored):
    """Every change costs the same.

    Args:
        config: Recipe section.
    """

    def __init__(self, config: L2SpMethodConfig) -> None:
        super().__init__(config.action)
        self._config = config

    def held(self, calibration: Calibration) -> Sequence[str]:
        """Return all parameters, or the named matrices."""
        return held_names(calibration.structure, self._config.target_modules)

    def guard(
        self, place: Place, name: str, anchor: Anchor, shards: ShardSet
    ) -> tuple[Metric | None, Projector | None]:
        """Return the identity."""
        return IdentityMetric(self._config.strength / 2), None


class _FisherAnchored(Anchored):
    """A method of this family that goes by a Fisher basis.

    Args:
        config: Recipe section.
        needed: Parts of a basis it needs.
    """

    def __init__(
        self, config: EwcMethodConfig | AlignguardMethodConfig, needed: Sequence[str]
    ) -> None:
        super().__init__(config.action)
        self._fisher = KnownFisher(config, needed)

    def identity(self) -> dict[str, Any]:
        """Return the hash of the first basis."""
        return {"fisher basis": self._fisher.first_hash}

    @property
    def refresh_steps(self) -> int | None:
        """Return the steps between two estimates."""
        return self._fisher.every

    def refresh(self, calibration: Calibration, step: int) -> None:
        """Measure again; guards are made anew at the next step."""
        self._fisher.refresh(calibration, step)
        self.forget_guards()

    def state_dict(self) -> dict[str, Any]:
        """Return what identifies the protection, and which estimate is in use."""
        return {**super().state_dict(), **self._fisher.state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Check the protection and open the estimate that was in use."""
        rest = self._fisher.load(state)
        require_same_state(rest, super().state_dict())
        self.forget_guards()


class Ewc(_FisherAnchored):
    """A change costs what the diagonal Fisher information says.

    Args:
        config: Recipe section.
    """

    def __init__(self, config: EwcMethodConfig) -> None:
        super().__init__(config, ["diagonal"])
        self._config = config

    def held(self, calibration: Calibration) -> Sequence[str]:
        """Return all parameters, or the named matrices."""
        self._fisher.prepare(calibration)
        return held_names(calibration.structure, self._config.target_modules)

    def guard(
        self, place: Place, name: str, anchor: Anchor, shards: ShardSet
    ) -> tuple[Metric | None, Projector | None]:
        """Return the diagonal form of this slice."""
        assert anchor.values is not None
        diagonal = self._fisher.basis.read("diagonal", name, place.start, place.length)
        return DiagonalMetric(diagonal.to(anchor.values.device), self._config.strength / 2), None


class Alignguard(_FisherAnchored):
    """Directions that alignment relies on are held back, on full weights.

    Args:
        config: Recipe section.
    """

    def __init__(self, config: AlignguardMethodConfig) -> None:
        super().__init__(config, STRUCTURES_OF[config.reading])
        self._config = config

    def held(self, calibration: Calibration) -> Sequence[str]:
        """Return the named matrices of linear layers."""
        found = match_targets(calibration.structure, self._config.target_modules)
        self._fisher.prepare(calibration)
        return [target.name for target in found]

    def guard(
        self, place: Place, name: str, anchor: Anchor, shards: ShardSet
    ) -> tuple[Metric | None, Projector | None]:
        """Return the low-rank form, and the projector onto its directions, through one frame."""
        assert anchor.values is not None
        device, config, basis = anchor.values.device, self._config, self._fisher.basis
        strength = 1.0 if config.action == "project_update" else config.strength
        # Where nothing is projected the projector only reports the leak.
        if config.reading == "mask":
            diagonal = basis.read("diagonal", name, place.start, place.length).to(device)
            mask = self._mask(diagonal, place, shards)
            outside = torch.full_like(diagonal, config.task_strength)
            form = torch.where(mask, strength * diagonal, outside)
            return DiagonalMetric(form, 1.0), Onto(MaskFrame(place, mask))
        frame, values = self._frame(basis, place, name, shards, device)
        return FrameMetric(frame, strength * values, config.task_strength), Onto(frame)

    def _mask(self, diagonal: Tensor, place: Place, shards: ShardSet) -> Tensor:
        count = floor_share(place.height * place.width, self._config.mask_fraction)
        segment = Segment(0, place.start, lambda: diagonal)
        (cut,) = find_cuts([segment], [count], shards.all_reduce_sum)
        return cut.chosen(diagonal, place.start)

    def _frame(
        self,
        basis: FisherBasis,
        place: Place,
        name: str,
        shards: ShardSet,
        device: torch.device,
    ) -> tuple[Frame, Tensor]:
        reading = self._config.reading
        if reading == "vector":
            directions = basis.read("vector", name, place.start, place.length)
            return VectorFrame(place, directions.to(device)), basis.values("vector", name)
        if reading == "left":
            frame = LeftFrame(place, basis.side("left", name).to(device))
            return frame, basis.values("left", name)
        if reading == "right":
            cut = find_cut_rows(place, shards.all_reduce_sum)
            right = basis.side("right", name).to(device)
            return RightFrame(place, right, cut), basis.values("right", name)
        assert reading == "two_sided"
        left, right = (basis.side(kind, name).to(device) for kind in ("left", "right"))
        return TwoSidedFrame(place, left, right), basis.grid(name)


class Osf(Anchored):
    """The leading singular triples of every matrix stay.

    Args:
        config: Recipe section.
    """

    def __init__(self, config: OsfMethodConfig) -> None:
        super().__init__("project_update")
        self._config = config
        self._sides: Mapping[str, tuple[Tensor, Tensor]] = {}

    def held(self, calibration: Calibration) -> Sequence[str]:
        """Return the named matrices; find their leading directions, one matrix at a time.

        Ranks take matrices in turn; only the directions travel.
        """
        targets = match_targets(calibration.structure, self._config.target_modules)
        self._sides = leading_directions(calibration, targets, self._config.rank)
        return [target.name for target in targets]

    def guard(
        self, place: Place, name: str, anchor: Anchor, shards: ShardSet
    ) -> tuple[Metric | None, Projector | None]:
        """Return the projector onto what must not move."""
        assert anchor.values is not None
        left, right = (side.to(anchor.values.device) for side in self._sides[name])
        cut = find_cut_rows(place, shards.all_reduce_sum)
        return None, Complement(TwoSidedComplement(place, left, right, cut))

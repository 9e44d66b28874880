"""A plan of the right shape before there is one: counts are right, the choice is not.

Memory and time depend on how many columns are frozen, not on which; so an estimate needs no
weights and no source data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from forgetscale.api import Batch, LabelledBatch, Method, ShardSet
from forgetscale.config import CalibrationConfig, Recipe
from forgetscale.data import TrainingData
from forgetscale.engine.calibration import COUNTED_ROWS
from forgetscale.engine.plans import PLAN_FOLDER
from forgetscale.errors import DataError
from forgetscale.masks import AdapterPair, FreezePlan, load_plan
from forgetscale.ops.losses import LossFunction
from forgetscale.projections.basis import FisherBasis, MeasuredBasis


class _NeedsWeights(Exception):
    """A method asked for values that shapes alone do not tell."""


@dataclass(slots=True)
class ShapesOnly:
    """A ``Calibration`` that knows the model's structure and the target text, and no values.

    Args:
        structure: Skeleton of the model.
        seed: ``run.seed``.
        target: Data that is trained on.
    """

    structure: nn.Module
    seed: int
    target: TrainingData
    peak_lr: float = 0.0
    num_ranks: int = 1

    def _refuse(self) -> NoReturn:
        raise _NeedsWeights

    @property
    def num_blocks(self) -> int:
        """Refuse: there is no source data."""
        self._refuse()

    @property
    def adapters(self) -> Mapping[str, AdapterPair]:
        """Refuse: what methods do with factors needs weights."""
        self._refuse()

    def named_modules(self) -> Mapping[str, nn.Module]:
        """Refuse: no live model."""
        self._refuse()

    def batches(self) -> Iterator[Batch]:
        """Refuse: there is no source data."""
        self._refuse()

    def forward(self, batch: Batch) -> None:
        """Refuse: no live model."""
        self._refuse()

    def backward(self, batch: Batch, labels: Tensor, loss: LossFunction) -> None:
        """Refuse: no live model."""
        self._refuse()

    def shards(self) -> ShardSet:
        """Refuse: no weights."""
        self._refuse()

    def read_source(self, name: str, start: int, length: int) -> Tensor:
        """Refuse: no weights."""
        self._refuse()

    def num_rows(self, source: CalibrationConfig | None) -> int:
        """Refuse: there is no source data."""
        self._refuse()

    def labelled(
        self, source: CalibrationConfig | None, *, sampled: bool
    ) -> Iterator[LabelledBatch]:
        """Refuse: there is no source data."""
        self._refuse()

    def sample_gradients(
        self, source: CalibrationConfig | None, *, per_sample: int, sampled: bool
    ) -> Iterator[ShardSet]:
        """Refuse: no live model."""
        self._refuse()

    def settle_basis(
        self,
        given: Path | None,
        settings: Mapping[str, Any],
        measure: Callable[[], MeasuredBasis],
    ) -> FisherBasis:
        """Refuse: a basis is weights."""
        self._refuse()

    def open_refreshed(self, step: int, self_hash: str) -> FisherBasis:
        """Refuse: a basis is weights."""
        self._refuse()

    def target_changes(self, num_steps: int, lr: float) -> ShardSet:
        """Refuse: no trial training."""
        self._refuse()

    def target_token_counts(self) -> Tensor:
        """Count every token of the target text; padding counts as the token it is filled with."""
        embedding: Any = self.structure
        size = int(embedding.get_input_embeddings().weight.shape[0])
        counts = torch.zeros(size, dtype=torch.int64)
        for part in self.target.parts:
            for row in range(0, part.token_set.num_rows, COUNTED_ROWS):
                rows = range(row, min(row + COUNTED_ROWS, part.token_set.num_rows))
                counts += torch.bincount(part.token_set.read(rows).flatten(), minlength=size)
        return counts

    def provenance(self) -> Mapping[str, Any]:
        """Return nothing: such a plan is never written."""
        return {}


@dataclass(frozen=True, slots=True)
class AssumedPlan:
    """A plan to estimate with, and where it comes from."""

    plan: FreezePlan | None
    source: str
    """One clause for the reader."""


def _existing(paths: Sequence[Path | None]) -> AssumedPlan | None:
    for path in paths:
        if path is not None and path.is_dir():
            return AssumedPlan(load_plan(path), f"read from {path}")
    return None


def assume_plan(
    recipe: Recipe,
    structure: Any,
    target: TrainingData,
    make_method: Callable[[Any], Method],
) -> AssumedPlan:
    """Return the plan of a run if it exists, else one made from shapes.

    A score is replaced by a random draw: as many columns or rows, other ones. Layers that read the
    same tensor then share fewer frozen columns than a real score gives them, so the compact
    layout's activations are rather over- than underestimated.

    Args:
        recipe: Resolved recipe.
        structure: Skeleton of the model.
        target: Data that is trained on.
        make_method: Makes the method from its recipe section.

    Raises:
        DataError: ``method.plan`` names a folder without a plan.
    """
    given = getattr(recipe.method, "plan", None)
    if given is not None and not Path(given).exists():
        raise DataError(f"method.plan: {given} does not exist; check the path.")
    found = _existing([recipe.run.output_dir / PLAN_FOLDER, given and Path(given)])
    if found is not None:
        assert found.plan is not None
        found.plan.check_model({n: tuple(p.shape) for n, p in structure.named_parameters()})
        return found
    section: Any = recipe.method
    drawn = hasattr(section, "score") and section.score != "rand"
    if drawn:
        section = replace(section, score="rand", calibration=None, fisher=None, plan=None)
    calibration = ShapesOnly(structure, recipe.run.seed, target)
    try:
        plan = make_method(section).prepare(calibration)
    except _NeedsWeights:
        return AssumedPlan(None, "not known before it is made: every element keeps its states")
    if plan is None:
        return AssumedPlan(None, "none, every element is trained")
    return AssumedPlan(plan, "drawn with the right counts" if drawn else "known from shapes")

"""The interface between the engine and the methods; nothing else.

The engine's step, as pseudo-code::

    plan = method.prepare(calibration)            # once, on a fresh run
    method.start(shards)                          # once, on a fresh run
    for step in 1..num_steps:
        method.refresh(calibration, step - 1)     # every refresh_steps, if it asks for that
        for micro_batch in step:                  # loss: sums over positions
            backward(loss(logits, labels) / global target tokens)
        method.transform_gradients(shards, step)
        gradients of frozen elements := 0         # before the norm is taken
        decoupled decay of what may move
        clip, optimizer step
        method.after_step(shards, step)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from forgetscale.config import CalibrationConfig
from forgetscale.masks import AdapterPair, FreezePlan
from forgetscale.ops.losses import LossFunction, cross_entropy
from forgetscale.projections.basis import FisherBasis, MeasuredBasis


@dataclass(slots=True)
class ParamShard:
    """This rank's slice of one parameter, padding removed."""

    name: str
    """Name in the Hugging Face checkpoint."""
    shape: tuple[int, ...]
    """Shape of the whole parameter."""
    start: int
    """First element of the slice in the flattened parameter."""
    grad: Tensor | None
    """``[S]`` fp32 gradient, reduced over ranks, not yet clipped."""
    param: Tensor
    """``[S]`` fp32 master weights (working copy for parameters that are not trained)."""


class ShardSet(Protocol):
    """All slices of this rank. The engine writes edits back."""

    adapters: Mapping[str, AdapterPair]
    """Adapted matrix -> names, shapes and scale of its factors; empty without an adapter. The
    factors are slices like any other; the weights beside them have no gradient."""

    rank: int
    """This rank, 0..size - 1."""
    size: int
    """Number of ranks."""
    lr: float
    """Learning rate of the step that is being made; 0 outside a step."""
    decay: float
    """Share of a matrix that the step's decoupled decay took: learning rate times weight decay."""

    def __iter__(self) -> Iterator[ParamShard]:
        """Yield the slices in the same order on every rank."""

    def all_reduce_sum(self, value: Tensor) -> Tensor:
        """Return the sum over ranks. Collective: every rank must call it."""

    def gather(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Return whole parameters as detached fp32 copies. Collective: every rank must call it."""

    def momentum(self, name: str) -> Tensor:
        """Return the ``[S]`` fp32 first moment of a trained slice, a view."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of one forward pass."""

    input_ids: Tensor
    """``[B, T]`` int64."""
    weight: Tensor
    """``[B]`` fp32, 1 for a real row and 0 for a row that only keeps ranks in step."""
    block: Tensor
    """``[B]`` int64, each row's position in the calibration order, ``0..num_blocks - 1``."""


@dataclass(frozen=True, slots=True)
class LabelledBatch:
    """Rows of one pass with what is predicted in them."""

    batch: Batch
    labels: Tensor
    """``[B, T]`` int64, for ``Calibration.backward``."""
    real: Tensor
    """``[B, T]`` bool, False for padding and for rows that only keep ranks in step."""
    loss: LossFunction
    """Negative log-likelihood summed over the labelled positions."""


class Calibration(Protocol):
    """The source model and source data before training; leaves the weights bit-equal.

    The partitioned model is built when first needed: methods that look at ``structure`` alone
    cost nothing.
    """

    structure: nn.Module
    """The model on the meta device: names, shapes, module types. No values, no process group."""
    seed: int
    """``run.seed``, for methods that draw at random."""
    peak_lr: float
    """``optim.lr``."""

    @property
    def adapters(self) -> Mapping[str, AdapterPair]:
        """Return adapted matrix -> its factors as in training; empty without an adapter."""

    @property
    def num_blocks(self) -> int:
        """Return how many rows all ranks' batches hold together, each counted once."""

    def named_modules(self) -> Mapping[str, nn.Module]:
        """Return the live modules for forward hooks; their parameters are empty outside forward."""

    def batches(self) -> Iterator[Batch]:
        """Yield this rank's batches; all ranks get the same number of equal shape."""

    def forward(self, batch: Batch) -> None:
        """Run the decoder body without gradients. Collective: every rank must call it."""

    def backward(self, batch: Batch, labels: Tensor, loss: LossFunction) -> None:
        """Run the whole model and carry the gradient of a loss back to every module's output.

        Gradients reach hooks on modules; no parameter gets one, nothing is reduced over ranks.

        Args:
            batch: Rows.
            labels: ``[B, T]`` int64; position ``t`` belongs to the prediction made at ``t - 1``.
            loss: Sum over positions, given logits ``[N, V]`` and the labels of those positions.

        Collective: every rank must call it.
        """

    def shards(self) -> ShardSet:
        """Return this rank's weights."""

    def target_token_counts(self) -> Tensor:
        """Return how often each token id occurs in the target text, ``[V]`` int64.

        ``V`` is the number of rows of the embedding. Collective: every rank must call it.
        """

    def target_changes(self, num_steps: int, lr: float) -> ShardSet:
        """Train a copy of the source model on the target data; return how its weights changed.

        The slices' ``param`` is the change in fp32. The run itself starts from the source weights.

        Args:
            num_steps: Optimizer steps from the start of the stream, > 0.
            lr: Constant learning rate, > 0.

        Collective: every rank must call it.
        """

    def read_source(self, name: str, start: int, length: int) -> Tensor:
        """Return elements of a flattened source weight in the model's type.

        It may be called after ``prepare`` too: it reads from disk, not from the live model.
        """

    @property
    def num_ranks(self) -> int:
        """Return the number of processes."""

    def num_rows(self, source: CalibrationConfig | None) -> int:
        """Return how many rows of a source are used; see ``labelled``."""

    def labelled(
        self, source: CalibrationConfig | None, *, sampled: bool
    ) -> Iterator[LabelledBatch]:
        """Yield this rank's batches with labels; all ranks get the same number of equal shape.

        Rows may be padded or supervised in parts (SFT): then only targets have labels.

        Args:
            source: Data; None takes the method's own calibration data.
            sampled: The model's own predictions are drawn as labels, the same for any number of
                ranks, in place of the data's.
        """

    def sample_gradients(
        self, source: CalibrationConfig | None, *, per_sample: int, sampled: bool
    ) -> Iterator[ShardSet]:
        """Yield gradients of the negative log-likelihood, summed over ``per_sample`` rows each.

        The slices' ``grad`` is reduced over ranks and holds until the next one is asked for; no
        weight changes. The live modules of ``named_modules`` are gone afterwards.

        Args:
            source: Data; None takes the method's own calibration data.
            per_sample: Rows whose gradients are summed; all ranks share them.
            sampled: As in ``labelled``.

        Collective: every rank must call it and take all of them.
        """

    def settle_basis(
        self,
        given: Path | None,
        settings: Mapping[str, Any],
        measure: Callable[[], MeasuredBasis],
    ) -> FisherBasis:
        """Return the run's Fisher basis: kept from before, given by path, or measured now and kept.

        Args:
            given: Folder of a finished basis, or None.
            settings: What the recipe asks for, by name; a finished basis must agree.
            measure: Measures it; called where there is none.

        Raises:
            ConfigError: A finished basis is of another model, convention or setting.

        Collective: every rank must call it.
        """

    def open_refreshed(self, step: int, self_hash: str) -> FisherBasis:
        """Return the basis that was refreshed at a step; it may be called after ``prepare`` too.

        Args:
            step: Step of ``Method.refresh``.
            self_hash: Its hash.

        Raises:
            DataError: It is gone, damaged, or another one.

        Collective: every rank must call it.
        """

    def provenance(self) -> Mapping[str, Any]:
        """Return hashes of model and calibration data, for the plan's header.

        The target text is named where it was looked at.
        """


class Method(Protocol):
    """A protection. What it needs of the run it gets through these calls alone."""

    def prepare(self, calibration: Calibration) -> FreezePlan | None:
        """Return the freeze plan, or None if nothing is protected."""

    loss: LossFunction
    """Sum over positions, ``[N, V], [N] -> []`` fp32: the recipe's ``method.loss``."""

    def start(self, shards: ShardSet) -> None:
        """Edit ``param`` of trained slices in place before the first step of a fresh run."""

    @property
    def refresh_steps(self) -> int | None:
        """Return the steps between two calls of ``refresh``; None for never."""

    def refresh(self, calibration: Calibration, step: int) -> None:
        """Measure again what ``prepare`` measured, at the weights after ``step`` steps.

        ``calibration`` is as in ``prepare``, but its model has the live weights, an adapter's
        update merged. Called before the next step; collective.
        """

    def transform_gradients(self, shards: ShardSet, step: int) -> None:
        """Edit ``grad`` of the slices in place."""

    def after_step(self, shards: ShardSet, step: int) -> Mapping[str, float]:
        """Edit ``param`` of the slices in place; return metrics."""

    def state_dict(self) -> dict[str, Any]:
        """Return state keyed by parameter name, independent of the number of ranks."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""


EDITS_GRADIENTS = "transform_gradients"
EDITS_PARAMS = "after_step"
EDITS_START = "start"


def overrides(method: Method, hook: str) -> bool:
    """Return whether a method does something in a hook; the engine skips hooks that do nothing.

    Args:
        method: The method.
        hook: ``EDITS_GRADIENTS``, ``EDITS_PARAMS`` or ``EDITS_START``.
    """
    return getattr(type(method), hook) is not getattr(Unprotected, hook)


class Unprotected:
    """A method that protects nothing; others inherit the hooks they do not need."""

    loss: LossFunction = cross_entropy
    """Set from the recipe by ``METHODS``; a protection does not ask which loss it is."""

    def prepare(self, calibration: Calibration) -> FreezePlan | None:
        """Freeze nothing."""
        return None

    def start(self, shards: ShardSet) -> None:
        """Leave the first values alone."""

    @property
    def refresh_steps(self) -> int | None:
        """Measure nothing again."""
        return None

    def refresh(self, calibration: Calibration, step: int) -> None:
        """Measure nothing again."""

    def transform_gradients(self, shards: ShardSet, step: int) -> None:
        """Leave the gradients alone."""

    def after_step(self, shards: ShardSet, step: int) -> Mapping[str, float]:
        """Leave the weights alone."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return no state."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Expect no state."""
        if state:
            raise ValueError(f"method {type(self).__name__} has no state, got {sorted(state)}")

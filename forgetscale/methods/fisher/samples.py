"""Diagonal and low-rank Fisher information from gradients as ZeRO-3 hands them out: in slices.

The gradient of a sample is the sum over its rows of the gradient of the rows' summed
log-likelihood. With labels drawn from the model such sums are mean-zero scores, so the square of a
sum over ``B`` rows has the expectation of the sum of their squares: with G_b the gradients of all
samples and N rows in all, ``F = (1/N) sum_b G_b G_b^T``. (The mean of a batch squared would have to
be multiplied by ``B^2``.)

Only slices of gradients are kept. The ``samples x samples`` Gram matrix is the one thing that is
summed over ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from forgetscale.api import Calibration
from forgetscale.config import CalibrationConfig, FisherBasisConfig
from forgetscale.errors import ConfigError
from forgetscale.methods.grouping import groups_within
from forgetscale.ops.fisher import contrast_weights, explained_rank, gram_eigenbasis, gram_matrix

BLOCK = 2**20
"""Elements of a slice that are handled at a time in fp64."""


class VectorPart(NamedTuple):
    """Directions of one flattened weight on this rank."""

    start: int
    directions: Tensor
    """``[S, m]`` fp32."""
    values: Tensor
    """``[m]`` fp64."""
    trace: float


@dataclass(slots=True)
class Pass:
    """What one pass over one data set is to collect, and what it found.

    Args:
        vectors: Weights whose gradients are kept, sample by sample.
        diagonals: Weights whose squared gradients are added up.
    """

    vectors: Sequence[str]
    diagonals: Sequence[str]
    grads: dict[str, Tensor] = field(default_factory=dict)
    """Name -> ``[samples, S]`` fp32."""
    squares: dict[str, Tensor] = field(default_factory=dict)
    """Name -> ``[S]`` fp32, not yet divided by the rows."""
    starts: dict[str, int] = field(default_factory=dict)
    num_samples: int = 0

    def run(
        self,
        calibration: Calibration,
        source: CalibrationConfig,
        num_rows: int,
        config: FisherBasisConfig,
    ) -> None:
        """Collect. Collective: every rank must call it."""
        per_sample = config.blocks_per_sample
        total = -(-num_rows // per_sample)
        for shards in calibration.sample_gradients(
            source, per_sample=per_sample, sampled=config.labels == "sampled"
        ):
            for shard in shards:
                grad = shard.grad
                if grad is None:
                    continue
                if shard.name in self.vectors:
                    if shard.name not in self.grads:
                        self.grads[shard.name] = torch.zeros(total, grad.numel())
                    self.grads[shard.name][self.num_samples] = grad.cpu()
                if shard.name in self.diagonals:
                    square = grad.square()
                    found = self.squares.setdefault(shard.name, torch.zeros_like(square))
                    found.add_(square)
                self.starts[shard.name] = shard.start
            self.num_samples += 1


def vector_groups(
    sizes: dict[str, int], num_samples: int, num_ranks: int, limit: int
) -> Iterator[list[str]]:
    """Return groups of weights whose sample gradients fit in a rank's memory together.

    Args:
        sizes: Weight -> elements.
        num_samples: Gradients kept of each.
        num_ranks: Ranks that share them.
        limit: Bytes allowed.

    Raises:
        ConfigError: One weight alone does not fit.
    """

    def needed() -> Iterator[tuple[str, int]]:
        for name, numel in sizes.items():
            size = 4 * num_samples * -(-numel // num_ranks)
            if size > limit:
                raise ConfigError(
                    f"method.calibration.max_statistics_bytes is {limit}, but {num_samples}"
                    f" gradients of {name} need {size} on each of {num_ranks} ranks; allow more"
                    " memory, use fewer samples (num_blocks, fisher.blocks_per_sample), or reading"
                    " left or right."
                )
            yield name, size

    return groups_within(needed(), limit)


def _combine(grads: Tensor, weights: Tensor) -> Tensor:
    """Return ``G_s^T weights`` in fp32, without an fp64 copy of the gradients."""
    found = torch.empty(grads.shape[1], weights.shape[1])
    for start in range(0, grads.shape[1], BLOCK):
        part = slice(start, start + BLOCK)
        found[part] = (grads[:, part].double().t() @ weights).float()
    return found


def vector_part(
    found: Pass,
    other: Pass | None,
    name: str,
    num_rows: int,
    config: FisherBasisConfig,
    all_reduce: Callable[[Tensor], Tensor],
) -> VectorPart:
    """Return the directions of one flattened weight.

    Args:
        found: Pass over the data that matter.
        other: Pass over general data, or None.
        name: The weight.
        num_rows: Rows of ``found``'s data.
        config: How many directions.
        all_reduce: Sum over ranks.

    Collective: every rank must call it.
    """
    grads = found.grads.pop(name)
    gram = all_reduce(gram_matrix(grads))
    trace = float(gram.trace()) / num_rows
    _, values = gram_eigenbasis(gram, gram.shape[0])
    # The Gram route divides by the number of samples, the Fisher matrix by that of rows.
    unit = gram.shape[0] / num_rows
    m = explained_rank(values * unit, trace, explained=config.explained, cap=config.max_rank)
    if other is None:
        weights, values = gram_eigenbasis(gram, m)
    else:
        theirs = other.grads.pop(name)
        cross = torch.zeros(theirs.shape[0], grads.shape[0], dtype=torch.float64)
        for start in range(0, grads.shape[1], BLOCK):
            part = slice(start, start + BLOCK)
            cross += theirs[:, part].double() @ grads[:, part].double().t()
        cross = all_reduce(cross)
        weights, values, _ = contrast_weights(gram, cross, m, damping=config.damping)
    return VectorPart(found.starts[name], _combine(grads, weights), values * unit, trace)

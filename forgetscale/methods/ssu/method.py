"""SSU: scores from shards and activations, one freeze plan for the whole run."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from forgetscale.api import Calibration, Unprotected
from forgetscale.config import SsuMethodConfig
from forgetscale.errors import ConfigError, DataError
from forgetscale.masks import FreezePlan, column_power_sums
from forgetscale.methods.ssu.statistics import InputStatistics, flatten, unflatten
from forgetscale.methods.ssu.targets import Target, embedding_names, find_targets
from forgetscale.ops.importance import (
    INPUT_STATISTIC,
    NORM_POWER,
    combine_scores,
    num_frozen,
    select_frozen,
)


def weight_norms(calibration: Calibration, targets: list[Target], power: int) -> dict[str, Tensor]:
    """Return the column norms ``||W[:, j]||_p`` of every target in fp64, from slices alone.

    Args:
        calibration: Source of slices.
        targets: Parameters to measure; for a vector the norm is ``|w_j|``.
        power: 1 or 2.

    Collective: every rank must call it (one all-reduce of one number per column).
    """
    shards = calibration.shards()
    wanted = {target.name: target for target in targets}
    sums: dict[str, Tensor] = {}
    for shard in shards:
        target = wanted.get(shard.name)
        if target is not None:
            sums[shard.name] = column_power_sums(shard.param, shard.start, target.width, power)
    sizes = {target.name: target.width for target in targets}
    total = shards.all_reduce_sum(flatten(sums, sizes))
    return {name: value.pow(1.0 / power) for name, value in unflatten(total, sizes).items()}


def input_norms(
    calibration: Calibration, targets: list[Target], statistic: str
) -> dict[str, Tensor]:
    """Run the calibration data and return one input statistic per column, in fp64.

    Args:
        calibration: Source of batches.
        targets: Parameters whose module inputs are measured.
        statistic: ``l2_norm`` or ``mean_square``.

    Raises:
        DataError: A module never ran, or its input has another width than the parameter.

    Collective: every rank must call it.
    """
    by_module = {t.module: t.width for t in targets if not t.is_bias}
    live = calibration.named_modules()
    statistics = InputStatistics({name: live[name] for name in by_module})
    try:
        for batch in calibration.batches():
            statistics.start(batch)
            calibration.forward(batch)
    finally:
        statistics.close()
    for name, width in by_module.items():
        found = statistics.sums.get(name)
        if found is None or found.numel() != width:
            got = "never ran" if found is None else f"has input width {found.numel()}"
            raise DataError(
                f"ssu: {name} {got} on the calibration data, expected input width {width}; this"
                " layer cannot be scored by activations (use score mag_l1 or rand)."
            )
    flat = flatten(statistics.sums, by_module)
    shards = calibration.shards()
    total = unflatten(shards.all_reduce_sum(flat), by_module)
    tokens = shards.all_reduce_sum(torch.tensor([statistics.num_tokens], dtype=torch.float64))
    if float(tokens) == 0:
        raise DataError("ssu: the calibration data holds no tokens; check method.calibration.path.")
    count = tokens.to(flat.device)
    if statistic == "l2_norm":
        return {name: value.sqrt() for name, value in total.items()}
    return {name: value / count for name, value in total.items()}


def vector_scores(weight: Tensor, statistic: Tensor | None, rule: str) -> Tensor:
    """Score the elements of a 1-D tensor: each counts as a column of one element.

    Args:
        weight: ``|w_j|``.
        statistic: Input statistic; None for biases, whose input is the constant 1.
        rule: ``paper`` gives ``|w_j| ||X_j||_2``, ``official`` ``|w_j| (1 + mean x_j^2)`` as its
            code does, magnitude rules ``|w_j|``.
    """
    if rule == "paper" and statistic is not None:
        return (weight * statistic).float()
    if rule == "official" and statistic is not None:
        return (weight * (1.0 + statistic)).float()
    return weight.float()


def random_frozen(name: str, width: int, frozen_fraction: float, seed: int) -> Tensor:
    """Draw columns uniformly; the draw depends on the seed and the parameter's name alone."""
    digest = hashlib.sha256(f"ssu-rand/{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
    order = torch.randperm(width, generator=generator)
    return order[: num_frozen(width, frozen_fraction)].sort().values


class Ssu(Unprotected):
    """Freeze the columns the source model relies on.

    Args:
        config: Recipe section.
    """

    def __init__(self, config: SsuMethodConfig) -> None:
        self._config = config

    def prepare(self, calibration: Calibration) -> FreezePlan:
        """Score all columns and return the plan. Collective: every rank must call it."""
        config = self._config
        found = find_targets(calibration.structure)
        scored = [t for t in found if not t.is_vector or config.vectors == "elementwise"]
        columns: Mapping[str, Tensor]
        if config.score == "rand":
            columns = {
                t.name: random_frozen(t.name, t.width, config.frozen_fraction, calibration.seed)
                for t in scored
            }
        else:
            columns = self._scored_columns(calibration, scored)
        whole = [t.name for t in found if t.is_vector and config.vectors == "freeze"]
        rows = self._shielded_rows(calibration)
        shield = config.shield_rows
        return FreezePlan(
            columns=columns,
            rows=rows,
            whole=frozenset(whole),
            provenance={
                "method": "ssu",
                "score": config.score,
                "frozen_fraction": config.frozen_fraction,
                "vectors": config.vectors,
                "shield_token_ids": list(config.shield_token_ids),
                "shield_rows": None if shield is None else asdict(shield),
                "seed": calibration.seed,
                **calibration.provenance(),
            },
        )

    def _scored_columns(
        self, calibration: Calibration, targets: list[Target]
    ) -> Mapping[str, Tensor]:
        rule = self._config.score
        norms = weight_norms(calibration, targets, NORM_POWER[rule])
        statistics: dict[str, Tensor] = {}
        if rule in INPUT_STATISTIC:
            statistics = input_norms(calibration, targets, INPUT_STATISTIC[rule])
        columns = {}
        for target in targets:
            statistic = None if target.is_bias else statistics.get(target.module)
            norm = norms[target.name]
            if target.is_vector:
                scores = vector_scores(norm, statistic, rule)
            else:
                scores = combine_scores(norm, statistic, rule)  # type: ignore[arg-type]
            columns[target.name] = select_frozen(scores, self._config.frozen_fraction).cpu()
        return columns

    def _shielded_rows(self, calibration: Calibration) -> dict[str, Tensor]:
        """Return the rows of embedding and head that never move, the same for both."""
        config = self._config
        structure: Any = calibration.structure
        size = int(structure.get_input_embeddings().weight.shape[0])
        shielded = torch.zeros(size, dtype=torch.bool)
        if config.shield_token_ids:
            if (largest := max(config.shield_token_ids)) >= size:
                raise ConfigError(
                    f"method.shield_token_ids holds {largest}, but the vocabulary has {size} rows."
                )
            shielded[list(config.shield_token_ids)] = True
        if config.shield_rows is not None:
            shielded |= calibration.target_token_counts() < config.shield_rows.min_count
        rows = shielded.nonzero().flatten()
        if rows.numel() == 0:
            return {}
        return {name: rows.clone() for name in embedding_names(calibration.structure)}

"""Row-wise freeze: whole output features, scored from slices.

Source: arXiv:2512.04844, row-wise ablation. Its code (gucci-j/ssu) ranks rows by ``||W[i, :]||_2``
and looks at no activations (``official``); ``paper`` is the element score summed over the row,
``sum_j |W_ij| ||X_j||_2``, so that rows and columns differ in the axis alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from forgetscale.api import Calibration
from forgetscale.masks import row_power_sums
from forgetscale.methods.ssu.statistics import flatten, unflatten
from forgetscale.methods.ssu.targets import Target
from forgetscale.ops.importance import num_frozen, select_frozen

ROW_POWER = {"paper": 1, "mag_l1": 1, "official": 2, "mag_l2": 2}
"""Power p of the norm over a row that each rule uses."""


def row_scores(
    calibration: Calibration, targets: Sequence[Target], statistics: Mapping[str, Tensor], rule: str
) -> dict[str, Tensor]:
    """Score every row of the targets, in fp64 over all ranks and rounded once to fp32.

    Args:
        calibration: Source of slices.
        targets: Matrices.
        statistics: Input norm per parameter name for ``paper``; not looked at by other rules.
        rule: ``paper``: ``sum_j |W_ij| ||X_j||_2``; ``official`` and ``mag_l2``:
            ``||W[i, :]||_2``; ``mag_l1``: ``||W[i, :]||_1``.

    Collective: every rank must call it (one all-reduce of one number per row).
    """
    shards = calibration.shards()
    wanted = {target.name: target for target in targets}
    power = ROW_POWER[rule]
    sums: dict[str, Tensor] = {}
    for shard in shards:
        target = wanted.get(shard.name)
        if target is not None:
            weights = statistics[target.name] if rule == "paper" else None
            sums[shard.name] = row_power_sums(
                shard.param, shard.start, target.width, target.shape[0], power, weights
            )
    sizes = {target.name: target.shape[0] for target in targets}
    total = shards.all_reduce_sum(flatten(sums, sizes))
    return {name: value.pow(1.0 / power).float() for name, value in unflatten(total, sizes).items()}


def frozen_rows(
    calibration: Calibration,
    targets: Sequence[Target],
    statistics: Mapping[str, Tensor],
    rule: str,
    frozen_fraction: float,
) -> dict[str, Tensor]:
    """Return the sorted indices of the rows to freeze, per matrix.

    Args:
        calibration: Source of slices and of the seed.
        targets: Matrices.
        statistics: See ``row_scores``.
        rule: See ``row_scores``; ``rand`` draws rows uniformly by seed and name.
        frozen_fraction: Share of the rows of each matrix, truncated to whole rows.

    Collective: every rank must call it.
    """
    if rule == "rand":
        return {
            target.name: _random_rows(target, frozen_fraction, calibration.seed)
            for target in targets
        }
    scores = row_scores(calibration, targets, statistics, rule)
    return {name: select_frozen(score, frozen_fraction).cpu() for name, score in scores.items()}


def _random_rows(target: Target, frozen_fraction: float, seed: int) -> Tensor:
    digest = hashlib.sha256(f"ssu-rand-row/{seed}/{target.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
    order = torch.randperm(target.shape[0], generator=generator)
    return order[: num_frozen(target.shape[0], frozen_fraction)].sort().values

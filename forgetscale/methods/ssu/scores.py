"""Column scores of SSU: which statistics they need, how those are measured, how they combine.

A score is a row in ``MATRIX_RULES`` and ``VECTOR_RULES`` (what is multiplied) and names a
statistic; a statistic is a function in ``STATISTICS``. A new score needs no more than these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from forgetscale.api import Calibration, ShardSet
from forgetscale.config import FisherConfig, SsuMethodConfig
from forgetscale.errors import DataError
from forgetscale.masks import column_power_sums
from forgetscale.methods.ssu.gradients import fisher_columns
from forgetscale.methods.ssu.statistics import (
    InputProducts,
    InputStatistics,
    flatten,
    run_pass,
    unflatten,
)
from forgetscale.methods.ssu.targets import Target
from forgetscale.ops.importance import (
    MATRIX_RULES,
    VECTOR_RULES,
    Rule,
    combine_scores,
    conditional_curvature,
    find_rule,
)

REDUCE_ELEMENTS = 2**24
"""Elements of a matrix that are summed over ranks at one time."""
DAMPING = 0.01
"""Share of the mean diagonal added to a Hessian's diagonal."""
Statistics = dict[str, dict[str, Tensor]]
"""Name of a statistic -> parameter name -> one fp64 number per column."""


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


def _module_widths(targets: list[Target]) -> dict[str, int]:
    return {target.module: target.width for target in targets if not target.is_bias}


def _reduce_inputs(
    calibration: Calibration, targets: list[Target], found: InputStatistics
) -> Statistics:
    """Add the sums of all ranks; return the statistics by parameter. A bias has no input."""
    widths = _module_widths(targets)
    found.check(widths)
    shards = calibration.shards()
    sums = {name: found.sums[found.owner[name]] for name in widths}
    flat = shards.all_reduce_sum(flatten(sums, widths))
    total = unflatten(flat, {name: 2 * width for name, width in widths.items()})
    counts = torch.tensor([found.num_tokens, found.num_rows], dtype=torch.float64)
    tokens, rows = shards.all_reduce_sum(counts).tolist()
    if tokens == 0:
        raise DataError("ssu: the calibration data holds no tokens; check method.calibration.path.")
    result: Statistics = {"l2_norm": {}, "mean_square": {}, "recent_mean_square": {}}
    for target in targets:
        if not target.is_bias:
            squares, recent = total[target.module].view(2, -1)
            result["l2_norm"][target.name] = squares.sqrt()
            result["mean_square"][target.name] = squares / tokens
            result["recent_mean_square"][target.name] = recent * (rows / tokens)
    return result


def input_statistics(
    calibration: Calibration, targets: list[Target], config: SsuMethodConfig
) -> Statistics:
    """Run the source data once; return everything that is known from squares of inputs.

    Args:
        calibration: Source of batches.
        targets: Parameters whose module inputs are measured.
        config: Recipe section.

    Returns:
        ``l2_norm``, ``mean_square`` and ``recent_mean_square`` (mean square of a block, averaged
        with ``recent_block_weights``); biases, whose input is the constant 1, are left out.

    Raises:
        DataError: A module never ran, or its input has another width than the parameter, or there
            are no tokens.

    Collective: every rank must call it.
    """
    live = calibration.named_modules()
    modules = {name: live[name] for name in _module_widths(targets)}
    statistics = InputStatistics(modules, calibration.num_blocks)
    run_pass(calibration, [statistics])
    return _reduce_inputs(calibration, targets, statistics)


def curvature_statistics(
    calibration: Calibration, targets: list[Target], config: SsuMethodConfig
) -> Statistics:
    """Return ``1 / [chol(H^-1)]_jj^2`` of every module input, and what one pass yields besides.

    ``H`` is one ``[I, I]`` matrix in fp64 per distinct input (q, k, v share theirs; gate, up too).
    As many as fit in ``calibration.max_statistics_bytes`` are summed in one pass over the data;
    the others wait for the next. The sums of ranks are added in pieces, one matrix is factorised
    at a time. A 1-D gain acts on its feature alone, so its ``H`` is diagonal and costs nothing.

    Args:
        calibration: Source of batches.
        targets: Parameters whose module inputs are measured.
        config: Recipe section.

    Raises:
        DataError: A module never ran; its inputs are not finite or all zero.
        ConfigError: A single matrix does not fit in the memory allowed.

    Collective: every rank must call it.
    """
    live = calibration.named_modules()
    matrices = [target for target in targets if not target.is_vector]
    waiting = {target.module: live[target.module] for target in matrices}
    modules = {name: live[name] for name in _module_widths(targets)}
    squares: InputStatistics | None = InputStatistics(modules, calibration.num_blocks)
    assert config.calibration is not None
    result: Statistics = {}
    curvature: dict[str, Tensor] = {}
    while waiting or squares is not None:
        products = InputProducts(waiting, config.calibration.max_statistics_bytes)
        run_pass(calibration, [products] if squares is None else [products, squares])
        if squares is not None:
            result = _reduce_inputs(calibration, targets, squares)
            squares = None
        left = products.left()
        for name in list(products.sums):
            found = _solve(calibration.shards(), name, products.sums.pop(name))
            shared = [module for module, owner in products.owner.items() if owner == name]
            curvature |= dict.fromkeys(shared, found)
        waiting = {name: module for name, module in waiting.items() if name in left}
    result["curvature"] = {target.name: curvature[target.module] for target in matrices}
    for target in targets:
        if target.is_vector and not target.is_bias:
            diagonal = result["l2_norm"][target.name].square()
            result["curvature"][target.name] = diagonal + DAMPING * diagonal.mean()
    return result


def _solve(shards: ShardSet, name: str, hessian: Tensor) -> Tensor:
    rows = max(1, REDUCE_ELEMENTS // hessian.shape[1])
    for start in range(0, hessian.shape[0], rows):
        part = hessian[start : start + rows]
        part.copy_(shards.all_reduce_sum(part))
    try:
        return conditional_curvature(hessian, DAMPING)
    except ValueError as error:
        raise DataError(
            f"ssu: {name} cannot be scored by sgpt_true: {error}; check the calibration data and"
            " the weights before this layer."
        ) from error


def fisher_statistics(
    calibration: Calibration, targets: list[Target], config: SsuMethodConfig
) -> Statistics:
    """Return ``sum_i F_ij`` of every parameter, biases too; see ``fisher_columns``.

    Args:
        calibration: Source of batches and gradients.
        targets: Parameters to score.
        config: Recipe section.

    Collective: every rank must call it.
    """
    sampled = (config.fisher or FisherConfig()).labels == "sampled"
    return {"fisher": fisher_columns(calibration, targets, sampled=sampled)}


Measure = Callable[[Calibration, list[Target], SsuMethodConfig], Statistics]
STATISTICS: Mapping[str, Measure] = {
    "curvature": curvature_statistics,
    "fisher": fisher_statistics,
    "l2_norm": input_statistics,
    "mean_square": input_statistics,
    "recent_mean_square": input_statistics,
}
"""Statistic -> how it is measured; one measurement may bring several. The costly come first."""


def column_scores_of(
    calibration: Calibration,
    targets: list[Target],
    scores: Sequence[str],
    config: SsuMethodConfig,
    measured: Statistics | None = None,
) -> dict[str, dict[str, Tensor]]:
    """Score the columns of all targets by several rules, with as few passes as they need.

    Args:
        calibration: The source model and source data.
        targets: Parameters to score.
        scores: Names of rules; those of activations share one pass.
        config: Recipe section; its own ``score`` is not looked at.
        measured: Statistics that are known already.

    Returns:
        Name of the rule -> parameter name -> scores in fp32.

    Raises:
        DataError: The data do not reach a parameter, or a score is not finite.

    Collective: every rank must call it.
    """
    rules = [(MATRIX_RULES, score) for score in scores] + [(VECTOR_RULES, s) for s in scores]
    wanted = {find_rule(table, score) for table, score in rules}
    found: Statistics = dict(measured or {})
    for name, measure in STATISTICS.items():
        if name not in found and any(rule.statistic == name for rule in wanted):
            found |= measure(calibration, targets, config)
    powers = {rule.norm for rule in wanted} - {None}
    norms = {power: weight_norms(calibration, targets, power) for power in powers if power}
    result: dict[str, dict[str, Tensor]] = {score: {} for score in scores}
    for score in scores:
        for target in targets:
            rule = find_rule(VECTOR_RULES if target.is_vector else MATRIX_RULES, score)
            result[score][target.name] = _score(target, rule, norms, found)
    return result


def _score(
    target: Target, rule: Rule, norms: Mapping[int, dict[str, Tensor]], found: Statistics
) -> Tensor:
    statistic = None
    if rule.statistic is not None:
        statistic = found[rule.statistic].get(target.name)
        if statistic is None:  # a bias: its input is the constant 1
            rule = replace(rule, statistic=None)
    norm = statistic if rule.norm is None else norms[rule.norm][target.name]
    assert norm is not None, target.name
    try:
        return combine_scores(norm, statistic, rule)
    except ValueError as error:
        raise DataError(f"ssu: {target.name}: {error}.") from error

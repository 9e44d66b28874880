"""A whole Fisher basis: which parts are measured, in which passes, and what is kept of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from forgetscale.api import Calibration
from forgetscale.config import CalibrationConfig, FisherBasisConfig
from forgetscale.errors import ConfigError
from forgetscale.methods.fisher.samples import Pass, vector_groups, vector_part
from forgetscale.methods.fisher.sides import SideMoments, measure_sides, side_groups
from forgetscale.methods.fisher.targets import held_names, match_targets
from forgetscale.methods.ssu.targets import Target
from forgetscale.ops.fisher import (
    contrast_side_basis,
    explained_rank,
    principal_cosines,
    side_basis,
)
from forgetscale.projections.basis import CONVENTION, FisherBasis, MeasuredBasis


def settings_of(
    config: FisherBasisConfig, needed: Iterable[str], target_modules: Sequence[str] | None
) -> dict[str, Any]:
    """Return what identifies a basis beside model and data, as it is recorded.

    Args:
        config: Recipe section.
        needed: Parts the method needs.
        target_modules: Recipe field.
    """
    found = asdict(config)
    contrast = found.pop("contrast")
    found["contrast"] = None if contrast is None else str(contrast["path"])
    found["structures"] = sorted({*needed, *config.structures})
    found["target_modules"] = None if target_modules is None else list(target_modules)
    return found


class _Builder:
    """Collects parts, and the sums that the model-wide scale is made of."""

    def __init__(self) -> None:
        self.measured = MeasuredBasis()
        self._sums: dict[str, float] = {}
        self._counts: dict[str, float] = {}
        self.cosines: list[float] = []
        """Of the principal angles between directions with and without contrast, in the mean, one
        number for each side of a matrix."""

    def values(self, kind: str, name: str, values: Tensor, trace: float) -> None:
        self.measured.whole[f"values/{kind}/{name}"] = values.float()
        self.measured.whole[f"trace/{kind}/{name}"] = torch.tensor(trace, dtype=torch.float64)
        self.count(kind, float(values.sum()), values.numel())

    def count(self, kind: str, total: float, number: int) -> None:
        self._sums[kind] = self._sums.get(kind, 0.0) + total
        self._counts[kind] = self._counts.get(kind, 0.0) + number

    def scales(self) -> dict[str, float]:
        return {kind: self._sums[kind] / self._counts[kind] for kind in self._sums}


def _sides(
    builder: _Builder,
    calibration: Calibration,
    targets: Sequence[Target],
    sides: Sequence[str],
    source: CalibrationConfig,
    config: FisherBasisConfig,
) -> None:
    sampled = config.labels == "sampled"
    contrast = config.contrast
    limit = source.max_statistics_bytes // (1 if contrast is None else 2)
    for group in side_groups(targets, sides, limit):
        ours = measure_sides(calibration, group, sides, source, sampled=sampled)
        theirs: Mapping[str, SideMoments] = {}
        if contrast is not None:
            theirs = measure_sides(calibration, group, sides, contrast, sampled=sampled)
        for target in group:
            moments = ours.pop(target.name)
            _keep_sides(builder, target, moments, theirs.get(target.name), config)


def _keep_sides(
    builder: _Builder,
    target: Target,
    moments: SideMoments,
    other: SideMoments | None,
    config: FisherBasisConfig,
) -> None:
    for side, matrix in moments.moments.items():
        values = torch.linalg.eigvalsh(matrix).flip(0)
        m = explained_rank(values, moments.trace, explained=config.explained, cap=config.max_rank)
        if other is None:
            basis, kept = side_basis(matrix, m)
        else:
            basis, kept, _ = contrast_side_basis(
                matrix, other.moments[side], m, damping=config.damping
            )
            plain, _ = side_basis(matrix, m)
            builder.cosines.append(float(principal_cosines(plain, basis).mean()))
        builder.measured.whole[f"{side}/{target.name}"] = basis.float()
        builder.values(side, target.name, kept, moments.trace)


def _samples(
    builder: _Builder,
    calibration: Calibration,
    vectors: Mapping[str, int],
    diagonals: Mapping[str, int],
    source: CalibrationConfig,
    config: FisherBasisConfig,
    num_rows: int,
) -> None:
    """Measure diagonals in the first pass, directions of flattened weights in as many as needed."""
    num_samples = -(-num_rows // config.blocks_per_sample)
    limit = source.max_statistics_bytes // (1 if config.contrast is None else 2)
    groups = list(vector_groups(dict(vectors), num_samples, calibration.num_ranks, limit))
    for number, group in enumerate(groups or [[]]):
        found = Pass(group, list(diagonals) if number == 0 else [])
        found.run(calibration, source, num_rows, config)
        reduce = calibration.shards().all_reduce_sum
        for name, squares in found.squares.items():
            diagonal = squares / num_rows
            builder.measured.slices[f"diagonal/{name}"] = found.starts[name], diagonal
            total = reduce(diagonal.double().sum().view(1))
            builder.count("diagonal", float(total), diagonals[name])
        other = None
        if config.contrast is not None and group:
            other = Pass(group, [])
            other_rows = calibration.num_rows(config.contrast)
            other.run(calibration, config.contrast, other_rows, config)
        for name in group:
            part = vector_part(found, other, name, num_rows, config, reduce)
            builder.measured.slices[f"vector/{name}"] = part.start, part.directions
            builder.values("vector", name, part.values, part.trace)


def measure_basis(
    calibration: Calibration,
    config: FisherBasisConfig,
    source: CalibrationConfig,
    needed: Iterable[str],
    target_modules: Sequence[str] | None,
) -> MeasuredBasis:
    """Measure the Fisher information of the source model on the calibration data.

    Args:
        calibration: Source model and data.
        config: How.
        source: The method's calibration section.
        needed: Parts the method needs: of ``diagonal``, ``vector``, ``left``, ``right``.
        target_modules: Matrices; None takes those of the decoder body, for a diagonal every
            parameter.

    Raises:
        ConfigError: A name matches nothing, more directions are asked for than there are samples,
            or memory is too small.

    Collective: every rank must call it.
    """
    settings = settings_of(config, needed, target_modules)
    structures = settings["structures"]
    structure = calibration.structure
    targets = match_targets(structure, target_modules)
    num_rows = calibration.num_rows(source)
    _require_samples(config, structures, num_rows)
    builder = _Builder()
    sides = [side for side in ("left", "right") if side in structures]
    if sides:
        _sides(builder, calibration, targets, sides, source, config)
    sizes = {name: param.numel() for name, param in structure.named_parameters()}
    vectors = {t.name: math.prod(t.shape) for t in targets} if "vector" in structures else {}
    held = held_names(structure, target_modules) if "diagonal" in structures else []
    diagonals = {name: sizes[name] for name in held}
    if vectors or diagonals:
        _samples(builder, calibration, vectors, diagonals, source, config, num_rows)
    builder.measured.payload = {
        "convention": CONVENTION,
        "settings": settings,
        "scale": builder.scales(),
        "num_rows": num_rows,
        "seed": calibration.seed,
        **calibration.provenance(),
    }
    if builder.cosines:
        cosine = sum(builder.cosines) / len(builder.cosines)
        builder.measured.payload["contrast_cosine"] = cosine
    return builder.measured


def _require_samples(config: FisherBasisConfig, structures: Sequence[str], num_rows: int) -> None:
    num_samples = -(-num_rows // config.blocks_per_sample)
    if "vector" in structures and config.max_rank > num_samples:
        raise ConfigError(
            f"method.fisher.max_rank is {config.max_rank}, but {num_rows} rows in sums of"
            f" {config.blocks_per_sample} make {num_samples} samples, and a Fisher matrix has no"
            " more directions than samples; lower max_rank or raise calibration.num_blocks."
        )


def add_earlier(measured: MeasuredBasis, earlier: FisherBasis, gamma: float) -> None:
    """Add the faded diagonal of earlier tasks: ``F = gamma F_old + F_new``, in place.

    Args:
        measured: This task's, not yet written.
        earlier: Basis of the tasks before.
        gamma: Share that stays, in [0, 1].

    Raises:
        ConfigError: The earlier basis has no diagonal, or another convention.
    """
    if earlier.payload.get("convention") != CONVENTION:
        raise ConfigError(
            f"method.previous: {earlier.directory} has the convention"
            f" {earlier.payload.get('convention')!r}, expected {CONVENTION!r}; measure it again."
        )
    for key, (start, diagonal) in measured.slices.items():
        kind, _, name = key.partition("/")
        if kind == "diagonal":
            old = earlier.read("diagonal", name, start, diagonal.numel())
            # Both in stored units: the scale of the sum is the sum of the scales.
            diagonal.add_(old.to(diagonal), alpha=gamma * earlier.scale("diagonal"))
    scales = measured.payload["scale"]
    scales["diagonal"] = scales["diagonal"] + gamma * float(earlier.payload["scale"]["diagonal"])
    measured.payload["earlier"] = {"self_hash": earlier.self_hash, "gamma": gamma}

"""SSU: scores from shards and activations, one freeze plan for the whole run."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from forgetscale.api import Calibration, Unprotected
from forgetscale.config import FisherConfig, SsuMethodConfig
from forgetscale.errors import ConfigError
from forgetscale.masks import FreezePlan
from forgetscale.methods.ssu.elements import frozen_elements
from forgetscale.methods.ssu.rows import frozen_rows
from forgetscale.methods.ssu.scores import Statistics, column_scores_of, input_statistics
from forgetscale.methods.ssu.targets import Target, embedding_names, find_targets
from forgetscale.ops.importance import num_frozen, select_frozen, select_jointly

STATISTIC = {"paper": "l2_norm", "official": "mean_square"}
"""Statistic of the inputs that a score of rows or elements multiplies by."""


def random_frozen(name: str, width: int, frozen_fraction: float, seed: int) -> Tensor:
    """Draw columns uniformly; the draw depends on the seed and the parameter's name alone."""
    digest = hashlib.sha256(f"ssu-rand/{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
    order = torch.randperm(width, generator=generator)
    return order[: num_frozen(width, frozen_fraction)].sort().values


class Ssu(Unprotected):
    """Freeze the columns, rows or elements the source model relies on.

    Args:
        config: Recipe section.
    """

    def __init__(self, config: SsuMethodConfig) -> None:
        self._config = config

    def prepare(self, calibration: Calibration) -> FreezePlan:
        """Score along the axis and return the plan. Collective: every rank must call it."""
        config = self._config
        found = find_targets(calibration.structure)
        scored = [t for t in found if not t.is_vector or config.vectors == "elementwise"]
        in_columns = [t for t in scored if t.is_vector or config.axis == "column"]
        measured = self._measure(calibration, scored)
        columns: Mapping[str, Tensor]
        scores: Mapping[str, Tensor] = {}
        if config.score == "rand":
            columns = {
                t.name: random_frozen(t.name, t.width, config.frozen_fraction, calibration.seed)
                for t in in_columns
            }
        else:
            scores = self._column_scores(calibration, in_columns, measured)
            columns = self._select(in_columns, scores)
        rows = self._shielded_rows(calibration)
        elements: dict[str, Tensor] = {}
        matrices = [t for t in scored if not t.is_vector]
        inputs = measured.get(STATISTIC.get(config.score, ""), {})
        rule, fraction = config.score, config.frozen_fraction
        if config.axis == "row":
            rows |= frozen_rows(calibration, matrices, inputs, rule, fraction)
        elif config.axis == "element":
            elements = frozen_elements(calibration, matrices, inputs, rule, fraction, config.scope)
        whole = [t.name for t in found if t.is_vector and config.vectors == "freeze"]
        shield = config.shield_rows
        return FreezePlan(
            columns=columns,
            rows=rows,
            whole=frozenset(whole),
            elements=elements,
            scores=scores,
            provenance={
                "method": "ssu",
                "score": config.score,
                "axis": config.axis,
                "scope": config.scope,
                "frozen_fraction": config.frozen_fraction,
                "vectors": config.vectors,
                "shield_token_ids": list(config.shield_token_ids),
                "shield_rows": None if shield is None else asdict(shield),
                "seed": calibration.seed,
                **self._estimator(),
                **calibration.provenance(),
            },
        )

    def _estimator(self) -> dict[str, Any]:
        if self._config.score != "fisher":
            return {}
        return {"fisher": asdict(self._config.fisher or FisherConfig())}

    def _measure(self, calibration: Calibration, targets: list[Target]) -> Statistics:
        """Measure inputs once for rows or elements and the vectors beside them."""
        config = self._config
        if config.axis == "row" and config.score == "official":
            # The published row score looks at weights alone; vectors keep theirs.
            targets = [target for target in targets if target.is_vector]
        if config.axis == "column" or config.score not in STATISTIC or not targets:
            return {}
        return input_statistics(calibration, targets, config)

    def _select(self, targets: list[Target], scores: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Choose the frozen columns; ``forgetscale`` takes those of all matrices together."""
        fraction = self._config.frozen_fraction
        joint = [t for t in targets if self._config.score == "forgetscale" and not t.is_vector]
        columns = {n: select_frozen(v, fraction) for n, v in scores.items()}
        if joint:
            heights = [target.shape[0] for target in joint]
            found = select_jointly([scores[t.name] for t in joint], heights, fraction)
            columns |= {t.name: index for t, index in zip(joint, found, strict=True)}
        return columns

    def _column_scores(
        self, calibration: Calibration, targets: list[Target], measured: Statistics
    ) -> Mapping[str, Tensor]:
        if not targets:
            return {}
        config = self._config
        found = column_scores_of(calibration, targets, [config.score], config, measured)
        return {name: value.cpu() for name, value in found[config.score].items()}

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

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
from forgetscale.methods.ssu.scores import column_scores_of
from forgetscale.methods.ssu.targets import Target, embedding_names, find_targets
from forgetscale.ops.importance import num_frozen, select_frozen


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
                **self._estimator(),
                **calibration.provenance(),
            },
        )

    def _estimator(self) -> dict[str, Any]:
        if self._config.score != "fisher":
            return {}
        return {"fisher": asdict(self._config.fisher or FisherConfig())}

    def _scored_columns(
        self, calibration: Calibration, targets: list[Target]
    ) -> Mapping[str, Tensor]:
        config = self._config
        scores = column_scores_of(calibration, targets, [config.score], config)[config.score]
        return {
            name: select_frozen(value, config.frozen_fraction).cpu()
            for name, value in scores.items()
        }

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

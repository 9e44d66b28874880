"""AdaLoRA (arXiv:2303.10512): triplets of SVD factors that matter least are taken away.

Each matrix is ``W + scale * B diag(E) A``. Every step the importance of each weight, the product of
running means of ``|w g|`` and of its deviation, is updated on each rank's slices; every
``interval`` steps the triplets of all matrices are ranked together (one sum over ranks of ``R``
numbers a matrix) and those beyond the budget get ``E = 0``. A triplet may come back while the
budget shrinks; from ``shrink_until_step`` on ranks stay.

The schedule really runs: PEFT needs a call of ``update_and_allocate`` in each step, which trainers
do not make, so published "AdaLoRA" baselines are often SVD adapters of constant rank. For those use
``method.kind: sft`` with ``adapter.kind: svd``.

Gradients are taken before clipping (they are those of the loss and of the orthogonality term), and
weights after the step, as PEFT does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from forgetscale.api import ParamShard, ShardSet, Unprotected
from forgetscale.config import AdaloraMethodConfig
from forgetscale.masks import AdapterPair
from forgetscale.ops.adalora import (
    keep_triplets,
    orthogonality_pull,
    rank_budget,
    triplet_parts,
    update_importance_,
)

_SENSITIVITY, _UNCERTAINTY, _KEPT = "sensitivity", "uncertainty", "kept"


class Adalora(Unprotected):
    """Take triplets away on the published schedule.

    Args:
        config: Recipe section.
    """

    def __init__(self, config: AdaloraMethodConfig) -> None:
        self._config = config
        self._grads: dict[str, Tensor] = {}
        self._means: dict[str, dict[str, Tensor]] = {_SENSITIVITY: {}, _UNCERTAINTY: {}}
        self._kept: dict[str, Tensor] = {}
        self._loaded: dict[str, Any] = {}
        self._shards: ShardSet | None = None
        self._orthogonality = 0.0

    # ---- in the step --------------------------------------------------------------------

    def transform_gradients(self, shards: ShardSet, step: int) -> None:
        """Add the orthogonality term's gradient; remember gradients for the importance.

        Gathers one pair of factors at a time. Collective.
        """
        self._shards = shards
        mine = {shard.name: shard for shard in shards if shard.grad is not None}
        self._take_loaded(mine)
        if self._config.orthogonality > 0:
            self._orthogonality = self._add_orthogonality(shards, mine)
        self._grads = {}
        if step < self._config.shrink_until_step:
            for name, shard in mine.items():
                assert shard.grad is not None
                self._grads[name] = shard.grad.clone()

    def _add_orthogonality(self, shards: ShardSet, mine: Mapping[str, ParamShard]) -> float:
        total = 0.0
        weight = self._config.orthogonality / (2 * len(shards.adapters))
        for pair in shards.adapters.values():
            names = {pair.lora_A: True, pair.lora_B: False}
            for name, whole in shards.gather(list(names)).items():
                norm, pull = orthogonality_pull(whole, by_row=names[name])
                total += weight * float(norm)
                grad = mine[name].grad
                assert grad is not None
                start = mine[name].start
                part = pull.reshape(-1)[start : start + grad.numel()]
                grad.add_(part.to(grad.device), alpha=weight)
        return total

    def after_step(self, shards: ShardSet, step: int) -> Mapping[str, float]:
        """Update importance, choose triplets when it is time, and zero what was dropped."""
        config = self._config
        mine = {shard.name: shard for shard in shards if shard.grad is not None}
        pairs = list(shards.adapters.values())
        start = sum(pair.rank for pair in pairs)
        target = config.target_rank * len(pairs)
        first, last = config.shrink_from_step, config.shrink_until_step
        budget = rank_budget(step, start=start, target=target, first=first, last=last)
        if step < last:
            self._update(mine)
        on_time = first < step < last and step % config.interval == 0
        if on_time or step == last:
            kept = keep_triplets(self._scores(shards, mine, pairs), budget)
            self._kept = {pair.matrix: row.cpu() for pair, row in zip(pairs, kept, strict=True)}
        if on_time or step >= last:
            self._drop(mine, pairs)
        if step == last:
            self._means = {_SENSITIVITY: {}, _UNCERTAINTY: {}}
        triplets = sum(int(row.sum()) for row in self._kept.values()) if self._kept else start
        return {
            "budget": float(budget),
            "mean_rank": triplets / len(pairs),
            "orthogonality": self._orthogonality,
        }

    def _update(self, mine: Mapping[str, ParamShard]) -> None:
        for name, shard in mine.items():
            for means in self._means.values():
                if name not in means:
                    means[name] = torch.zeros_like(shard.param)
            update_importance_(
                self._means[_SENSITIVITY][name],
                self._means[_UNCERTAINTY][name],
                shard.param,
                self._grads[name],
                beta1=self._config.sensitivity_beta,
                beta2=self._config.uncertainty_beta,
            )
        self._grads = {}

    def _scores(
        self, shards: ShardSet, mine: Mapping[str, ParamShard], pairs: list[AdapterPair]
    ) -> Tensor:
        rows = []
        for pair in pairs:
            parts = [
                triplet_parts(self._score(mine[name]), mine[name].start, shape, by_row=by_row)
                for (name, shape), by_row in zip(
                    pair.factor_shapes().items(), (True, False, True), strict=True
                )
            ]
            rows.append(torch.stack(parts).sum(0))
        return shards.all_reduce_sum(torch.stack(rows))

    def _score(self, shard: ParamShard) -> Tensor:
        return self._means[_SENSITIVITY][shard.name] * self._means[_UNCERTAINTY][shard.name]

    def _drop(self, mine: Mapping[str, ParamShard], pairs: list[AdapterPair]) -> None:
        for pair in pairs:
            shard = mine[pair.lora_E]
            kept = self._kept[pair.matrix][shard.start : shard.start + shard.param.numel()]
            shard.param.masked_fill_(~kept.to(shard.param.device), 0.0)

    # ---- checkpoints --------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return running means of whole factors and what is kept. Collective."""
        if self._shards is None or self._loaded:
            return self._loaded
        found: dict[str, Any] = {_KEPT: dict(self._kept)}
        mine = {shard.name: shard for shard in self._shards}
        for kind, means in self._means.items():
            found[kind] = {
                name: self._whole(self._shards, mine[name], values)
                for name, values in means.items()
            }
        return found

    @staticmethod
    def _whole(shards: ShardSet, shard: ParamShard, values: Tensor) -> Tensor:
        # A sum with zeros is exact.
        whole = torch.zeros(torch.Size(shard.shape).numel())
        whole[shard.start : shard.start + values.numel()] = values.cpu()
        return shards.all_reduce_sum(whole)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` returned; slices are cut when the first step shows them."""
        self._loaded = dict(state)

    def _take_loaded(self, mine: Mapping[str, ParamShard]) -> None:
        if not self._loaded:
            return
        self._kept = dict(self._loaded[_KEPT])
        for kind, means in self._means.items():
            for name, whole in self._loaded[kind].items():
                shard = mine[name]
                part = whole[shard.start : shard.start + shard.param.numel()]
                means[name] = part.to(shard.param.device, copy=True)
        self._loaded = {}

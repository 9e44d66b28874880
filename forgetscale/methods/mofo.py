"""Momentum-filtered optimizer: Adam keeps all moments, but moves few entries of each matrix.

Source: arXiv:2407.20999 and its code (YChen-zzz/MoFO, ``algorithms_MoFO.py``). In every step and
matrix the share ``fraction`` with the largest ``|first moment|`` (this step's gradient included)
takes Adam's step; the others are only decayed. Norms and biases move fully, embedding and head are
filtered, as in that code. Where moments are equal at the threshold that code moves all of them;
here the earlier ones are moved, so that the count is exact for any number of ranks.

Moments are known only after the step, so a step keeps the weights of before (4 bytes a filtered
element) and puts them back where nothing should move.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor

from forgetscale.api import ShardSet, Unprotected
from forgetscale.config import MofoMethodConfig
from forgetscale.masks import Segment, find_cuts
from forgetscale.ops.importance import num_frozen as floor_share


class Mofo(Unprotected):
    """Put back what the momentum does not choose.

    Args:
        config: Recipe section.
    """

    def __init__(self, config: MofoMethodConfig) -> None:
        self._fraction = config.fraction
        self._before: dict[str, Tensor] = {}

    def transform_gradients(self, shards: ShardSet, step: int) -> None:
        """Keep the weights of before the step; gradients stay."""
        if self._fraction == 1.0:
            return
        self._before = {
            shard.name: shard.param.clone()
            for shard in shards
            if shard.grad is not None and len(shard.shape) > 1
        }

    def after_step(self, shards: ShardSet, step: int) -> Mapping[str, float]:
        """Undo Adam's step, but not decay, where the momentum is small. Collective."""
        if self._fraction == 1.0:
            return {}
        mine = [shard for shard in shards if shard.name in self._before]
        sizes = [prod(shard.shape) for shard in mine]
        # At least one: a step that moves nothing of a matrix is no step.
        counts = [max(1, floor_share(size, self._fraction)) for size in sizes]
        segments = [
            Segment(group, shard.start, lambda name=shard.name: shards.momentum(name).abs())  # type: ignore[misc]
            for group, shard in enumerate(mine)
        ]
        cuts = find_cuts(segments, counts, shards.all_reduce_sum)
        for shard, cut in zip(mine, cuts, strict=True):
            moved = cut.chosen(shards.momentum(shard.name).abs(), shard.start)
            still = self._before.pop(shard.name).mul_(1.0 - shards.decay)
            shard.param.copy_(torch.where(moved, shard.param, still))
        return {"moved": sum(counts) / sum(sizes)}

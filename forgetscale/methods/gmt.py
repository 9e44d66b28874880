"""Gradient-mask tuning (GMT): in every step only the largest gradients of each tensor count.

Source: arXiv:2406.15330. The gradient of the whole step (all micro-batches, all ranks) is taken;
per tensor the share ``trainable_fraction`` with the largest ``|gradient|`` is kept, the rest is set
to zero before the norm is taken, so clipping sees what is left. Embedding and head are exempt.
Thresholds are exact: with equal gradients the earlier element is kept.

A gradient of zero does not hold a weight still: Adam's momentum and weight decay move it. ``gmt``
restores masked weights after the step, so that a masked element does not change in that step, decay
included; its moments go on and fade (they saw a gradient of zero). This costs, for one step at a
time, one bit an element and four bytes a masked one.

``gmt_official`` is what gucci-j/ssu ran (``gmt_trainer.py``): elements equal to the threshold are
all kept, masked elements go on moving by momentum and decay, and nothing is clipped (the recipe
must say so: ``optim.max_grad_norm`` of at least 1e6). That code masks the accumulated gradient
after every micro-batch; here the gradient is reduced over ranks once a step, so it is masked once.
With one micro-batch a step both are the same. Its second, empty optimizer step, which advances
Adam's step counter twice, is not repeated.

The mask moves, so nothing is protected for good and there is no freeze plan.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from forgetscale.api import Calibration, ParamShard, ShardSet, Unprotected
from forgetscale.config import GmtMethodConfig
from forgetscale.masks import Cut, ElementMask, Segment, find_cuts, pack_slice
from forgetscale.methods.structure import body_sizes
from forgetscale.ops.importance import num_frozen as floor_share


def magnitude_keys(grad: Tensor) -> Tensor:
    """Return int32 keys in the order of ``|grad|``; NaN is largest, so it is kept and noticed."""
    return grad.abs().view(torch.int32)


class GmtOfficial(Unprotected):
    """Zero small gradients; what Adam makes of it is left as it is.

    Args:
        config: Recipe section.
    """

    keeps_ties = True

    def __init__(self, config: GmtMethodConfig) -> None:
        self._config = config
        self._sizes: Mapping[str, int] | None = None

    def prepare(self, calibration: Calibration) -> None:
        """Note which parameters are masked; there is no plan."""
        self._sizes = body_sizes(calibration.structure)

    def transform_gradients(self, shards: ShardSet, step: int) -> None:
        """Zero all but the largest gradients of each tensor. Collective."""
        assert self._sizes is not None, "prepare comes first"
        if self._config.trainable_fraction == 1.0:
            return
        mine = [s for s in shards if s.name in self._sizes and s.grad is not None]
        counts = [
            floor_share(self._sizes[shard.name], self._config.trainable_fraction) for shard in mine
        ]
        segments = [
            Segment(group, shard.start, lambda shard=shard: _keys_of(shard))  # type: ignore[misc]
            for group, shard in enumerate(mine)
        ]
        cuts = find_cuts(segments, counts, shards.all_reduce_sum)
        for shard, cut in zip(mine, cuts, strict=True):
            self._mask(shard, cut.with_ties if self.keeps_ties else cut)

    def _mask(self, shard: ParamShard, cut: Cut) -> None:
        assert shard.grad is not None
        shard.grad.mul_(cut.chosen(_keys_of(shard), shard.start))


class Gmt(GmtOfficial):
    """Zero small gradients and hold their weights still in that step.

    Args:
        config: Recipe section.
    """

    keeps_ties = False

    def __init__(self, config: GmtMethodConfig) -> None:
        super().__init__(config)
        self._held: dict[str, tuple[ElementMask, Tensor]] = {}

    def _mask(self, shard: ParamShard, cut: Cut) -> None:
        assert shard.grad is not None
        masked = ~cut.chosen(_keys_of(shard), shard.start)
        length = masked.numel()
        held = ElementMask.build(0, length, pack_slice(masked, 0, length))
        held.zero_frozen_(shard.grad)
        self._held[shard.name] = (held, held.frozen_elements(shard.param))

    def after_step(self, shards: ShardSet, step: int) -> Mapping[str, float]:
        """Put the masked weights back to what they were before the step."""
        for shard in shards:
            if shard.name in self._held:
                mask, values = self._held.pop(shard.name)
                mask.put_frozen_(shard.param, values)
        return {}


def _keys_of(shard: ParamShard) -> Tensor:
    assert shard.grad is not None
    return magnitude_keys(shard.grad)

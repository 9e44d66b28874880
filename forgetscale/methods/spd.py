"""Selective projection decay: tensors that run away from the source are pulled back a little.

Source: arXiv:2411.01713 and its code (GT-RIPL/Selective-Projection-Decay, ``adamSPD.py``). With
``d = theta - theta_0`` and ``g`` the gradient of the step, per tensor: where ``<g, d> > 0`` (a step
against ``g`` would come nearer to the source, and Adam's went on all the same, or will)

    theta_new <- theta_new - strength * ratio * d_new
    ratio = clip((||d_new|| - ||d||) / ||d_new||, 0, 1)

The inner product is taken with the gradient before clipping: clipping scales it and cannot change
its sign. Norms and products are sums over ranks, three numbers a tensor and step. The source slices
are kept in the model's type.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from forgetscale.api import Calibration, ShardSet, Unprotected
from forgetscale.config import SpdMethodConfig


def pull_share(before: Tensor, after: Tensor) -> Tensor:
    """Return by how much the distance to the source grew, as a share of the new distance.

    Args:
        before: ``||d||`` before the step, >= 0.
        after: ``||d||`` after it, >= 0.

    Returns:
        ``clip((after - before) / after, 0, 1)``; 0 where nothing moved.

    Source:
        ``AdamSPD._ratio`` of the published code.
    """
    share = (after - before) / torch.where(after > 0, after, 1.0)
    return share.clamp(0.0, 1.0)


class Spd(Unprotected):
    """Pull tensors whose step went away from the source against the gradient's advice.

    Args:
        config: Recipe section.
    """

    def __init__(self, config: SpdMethodConfig) -> None:
        self._strength = config.strength
        self._read: Callable[[str, int, int], Tensor] | None = None
        self._source: dict[str, Tensor] = {}
        self._before = torch.zeros(0, 2, dtype=torch.float64)

    def prepare(self, calibration: Calibration) -> None:
        """Note where source weights are read; there is no plan."""
        self._read = calibration.read_source

    def _change(self, name: str, start: int, param: Tensor) -> Tensor:
        """Return the change of a slice since the source model, fp32."""
        if name not in self._source:
            assert self._read is not None, "prepare comes first"
            self._source[name] = self._read(name, start, param.numel()).to(param.device)
        return param - self._source[name].float()

    def transform_gradients(self, shards: ShardSet, step: int) -> None:
        """Note ``<g, d>`` and ``||d||`` of every tensor; gradients stay. Collective."""
        if self._strength == 0.0:
            return
        rows = []
        for shard in shards:
            if shard.grad is not None:
                change = self._change(shard.name, shard.start, shard.param).double()
                found = [(shard.grad.double() * change).sum(), change.square().sum()]
                rows.append(torch.stack(found).cpu())
        self._before = shards.all_reduce_sum(torch.stack(rows))

    def after_step(self, shards: ShardSet, step: int) -> Mapping[str, float]:
        """Pull back. Collective."""
        if self._strength == 0.0:
            return {}
        mine = [shard for shard in shards if shard.grad is not None]
        changes = [self._change(shard.name, shard.start, shard.param) for shard in mine]
        squares = torch.stack([change.double().square().sum().cpu() for change in changes])
        squares = shards.all_reduce_sum(squares)
        share = pull_share(self._before[:, 1].sqrt(), squares.sqrt())
        share = torch.where(self._before[:, 0] > 0, share, 0.0)
        for shard, change, amount in zip(mine, changes, share.tolist(), strict=True):
            if amount > 0:
                shard.param.sub_(change, alpha=self._strength * amount)
        return {
            "pulled": float((share > 0).double().mean()),
            "change_norm": float(squares.sum().sqrt()),
        }

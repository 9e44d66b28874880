"""Restoration while training: source values return to the weights that changed most.

It works on this rank's slices at a step boundary, between the optimizer's step and the next
forward pass. What is chosen is the same for any number of ranks: an exact threshold from counts of
bit patterns (``find_cuts``), of equal scores the earlier by tensor name and flat index. A restored
element holds its source value in the fp32 master, in the working copy and in gathered copies; its
first moment is zero unless the recipe keeps it.

Source slices are read from the model folder for the length of one restoration and not kept.

Source: arXiv:2509.16596, section 5, there done once after training on whole models in memory.
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor

from forgetscale.config import RestoreConfig
from forgetscale.errors import ConfigError
from forgetscale.masks import Segment, find_cuts
from forgetscale.masks.region import Region, default_region
from forgetscale.ops.delta import relative_change
from forgetscale.zero3 import ReadSlice, ZeroEngine
from forgetscale.zero3.shards import Slice


def change_scores(source: Tensor, tuned: Tensor, score: str, side: str, eps: float) -> Tensor:
    """Return fp32 scores of which the largest are put back.

    Args:
        source: ``[S]`` source values, any float type.
        tuned: ``[S]`` fp32 values now.
        score: ``relative``, ``absolute`` or ``base``.
        side: ``bottom`` turns the order around.
        eps: Of ``relative``, > 0.
    """
    wide = source.float()
    if score == "relative":
        found = relative_change(wide, tuned, eps)
    else:
        found = (tuned - wide).abs() if score == "absolute" else wide.abs()
    return found if side == "top" else -found


class Restoration:
    """The recipe's section ``restore``, on one engine.

    Args:
        config: Recipe section.
        engine: The engine of the run.
        read: Gives slices of source weights by the names the engine uses.

    Raises:
        ConfigError: No trained tensor is in the region, or the share is less than one element.

    Collective: every rank must make it.
    """

    def __init__(self, config: RestoreConfig, engine: ZeroEngine, read: ReadSlice) -> None:
        self._config = config
        self._engine = engine
        self._read = read
        shards = engine.shards
        trained = [item for item in shards.slices if shards.gradient(item) is not None]
        names = [item.name for item in trained]
        region = default_region(names)
        if config.include is not None or config.exclude is not None:
            region = Region(config.include or ".", config.exclude or "")
        self._items = sorted(
            (item for item in trained if region.holds(item.name)), key=lambda item: item.name
        )
        if not self._items:
            raise ConfigError(
                f"restore: no trained tensor's name matches include {region.include!r} without"
                f" {region.exclude!r} (the first trained one is {min(names)}); correct the"
                " expressions."
            )
        self._masks = shards.masks
        mine = torch.tensor([self._num_trained(item) for item in self._items])
        self._sizes: list[int] = shards.all_reduce_sum(mine).tolist()
        share = Fraction(str(config.fraction))
        sizes = self._sizes if config.scope == "tensor" else [sum(self._sizes)]
        self._counts = [math.floor(share * size) for size in sizes]
        if not any(self._counts):
            raise ConfigError(
                f"restore.fraction {config.fraction} of {sum(sizes)} elements ({config.scope}"
                " scope) is less than one element; raise it."
            )

    def _frozen(self, item: Slice) -> Tensor | None:
        """Return which elements of a slice a mask holds still, ``[S]`` bool; None for none."""
        mask = self._masks.get(item.name)
        if mask is None:
            return None
        kept = torch.ones(item.length, device=self._engine.shards.master(item).device)
        mask.zero_frozen_(kept)
        return kept == 0

    def _num_trained(self, item: Slice) -> int:
        frozen = self._frozen(item)
        return item.length if frozen is None else item.length - int(frozen.sum())

    def after_step(self, step: int) -> dict[str, float]:
        """Put source values back where this step is one to do so; return metrics. Collective."""
        if step % self._config.every_steps != 0:
            return {}
        return {f"restore/{name}": value for name, value in self.apply().items()}

    def _score(self, item: Slice, source: Tensor) -> Tensor:
        config = self._config
        tuned = self._engine.shards.master(item).float()
        found = change_scores(source, tuned, config.score, config.side, config.eps)
        frozen = self._frozen(item)
        if frozen is not None:  # below all that is not, so that it is never chosen
            found.masked_fill_(frozen, -math.inf)
        return found

    @torch.no_grad()
    def apply(self) -> dict[str, float]:
        """Put the source values back.

        Returns:
            Metrics: elements put back, and the distance to the source over the region before and
            after.

        Collective: every rank must call it.
        """
        shards = self._engine.shards
        dtype = self._items[0].working.dtype
        source = {
            item.name: self._read(item.name, item.start, item.length, dtype).to(
                shards.master(item).device
            )
            for item in self._items
        }
        segments, places, first = [], [], 0
        for number, item in enumerate(self._items):
            is_global = self._config.scope == "global"
            place = (0, first + item.start) if is_global else (number, item.start)
            first += int(item.param.ds_numel)
            places.append(place)
            segments.append(
                Segment(*place, lambda item=item: self._score(item, source[item.name]))  # type: ignore[misc]
            )
        cuts = find_cuts(segments, self._counts, shards.all_reduce_sum)
        before = self._distance(source)
        for item, (group, start) in zip(self._items, places, strict=True):
            chosen = cuts[group].chosen(self._score(item, source[item.name]), start)
            master = shards.master(item)
            master.copy_(torch.where(chosen, source[item.name].to(master.dtype), master))
            if self._config.momentum == "zero":
                shards.states(item)["exp_avg"].masked_fill_(chosen, 0.0)
        after = self._distance(source)
        shards.write_params()
        return {
            "restored": float(sum(self._counts)),
            "distance_before": before,
            "distance_after": after,
        }

    def _distance(self, source: dict[str, Tensor]) -> float:
        shards = self._engine.shards
        total = torch.zeros((), dtype=torch.float64)
        for item in self._items:
            change = shards.master(item).double() - source[item.name].double()
            total += change.square().sum().cpu()
        return math.sqrt(float(shards.all_reduce_sum(total)))

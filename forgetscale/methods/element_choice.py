"""Choose single elements of a model by a score, exactly, from slices alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from forgetscale.api import ParamShard, ShardSet
from forgetscale.masks import Cut, Segment, find_cuts, pack_slice

Keys = Callable[[ParamShard], Tensor]
"""``[S]`` scores of a slice, fp32, or int32 keys of the same order."""


def choose_elements(
    shards: ShardSet,
    sizes: Mapping[str, int],
    count: Callable[[int], int],
    keys: Keys,
    *,
    scope: str,
) -> dict[str, Tensor]:
    """Choose the elements with the highest keys and return their bits, whole tensors each.

    Equal keys are chosen in the model's order: earlier tensor, lower place.

    Args:
        shards: Slices of the model.
        sizes: Parameter name -> elements, in the model's order; the parameters ranked.
        count: Elements of a group -> how many to choose.
        keys: Keys of a slice; called a few times.
        scope: ``tensor`` ranks each parameter alone, ``global`` all together.

    Collective: every rank must call it (small counts, then one bit per element).
    """
    offsets: dict[str, int] = {}
    groups: dict[str, int] = {}
    for number, name in enumerate(sizes):
        groups[name] = 0 if scope == "global" else number
        offsets[name] = 0
    if scope == "global":
        total = 0
        for name, size in sizes.items():
            offsets[name] = total
            total += size
        totals = [total]
    else:
        totals = list(sizes.values())

    def segment(shard: ParamShard) -> Segment:
        return Segment(groups[shard.name], offsets[shard.name] + shard.start, lambda: keys(shard))

    mine = [shard for shard in shards if shard.name in sizes]
    counts = [count(size) for size in totals]
    cuts = find_cuts([segment(shard) for shard in mine], counts, shards.all_reduce_sum)
    found = {}
    for shard in mine:
        cut: Cut = cuts[groups[shard.name]]
        chosen = cut.chosen(keys(shard), offsets[shard.name] + shard.start)
        bits = pack_slice(chosen, shard.start, sizes[shard.name])
        found[shard.name] = shards.all_reduce_sum(bits).cpu()
    return found

"""Jobs that watch a moving mask step by step."""

from __future__ import annotations

from typing import Any
from unittest import mock

from torch import Tensor

import forgetscale.engine.loop as loop
from forgetscale.engine.restoration import Restoration
from forgetscale.methods.gmt import Gmt, GmtOfficial
from tests.distributed.jobs.training import command


def watch(recipe: dict) -> dict[str, Any]:
    """Train; count masked elements of this rank over all steps, and those that changed then.

    Args:
        recipe: A recipe of ``gmt`` or ``gmt_official``.
    """
    count = {"masked": 0, "changed": 0, "kept": 0, "kept_changed": 0}
    masked: dict[str, Tensor] = {}
    kind = Gmt if recipe["method"]["kind"] == "gmt" else GmtOfficial
    original_step, original = loop.train_step, kind.transform_gradients

    def transform(self: Any, shards: Any, step: int) -> None:
        original(self, shards, step)
        masked.clear()
        masked.update(
            {s.name: s.grad == 0 for s in shards if s.grad is not None and ".layers." in s.name}
        )

    def train_step(job: Any, batch: Any, number: int) -> Any:
        before = {s.name: s.param.clone() for s in job.engine.shards}
        result = original_step(job, batch, number)
        for shard in job.engine.shards:
            if shard.name in masked:
                mask, moved = masked[shard.name], shard.param != before[shard.name]
                count["masked"] += int(mask.sum())
                count["changed"] += int(moved[mask].sum())
                count["kept"] += int((~mask).sum())
                count["kept_changed"] += int(moved[~mask].sum())
        return result

    with (
        mock.patch.object(kind, "transform_gradients", transform),
        mock.patch.object(loop, "train_step", train_step),
    ):
        command(recipe)
    return count


def watch_restoration(recipe: dict) -> dict[str, int]:
    """Train; after each restoration compare every copy of what was put back with the source.

    Args:
        recipe: A recipe with a section ``restore``.
    """
    names = ("steps", "restored", "elements", "wrong_working", "wrong_gathered", "wrong_moment")
    count = dict.fromkeys(names, 0)
    original = Restoration.apply

    def apply(self: Any) -> dict[str, float]:
        shards = self._engine.shards
        before = {item.name: shards.master(item).clone() for item in self._items}
        found = original(self)
        count["steps"] += 1
        for item in self._items:
            master, states = shards.master(item), shards.states(item)
            dtype = item.working.dtype
            source = self._read(item.name, item.start, item.length, dtype)
            back = (master == source.float()) & (before[item.name] != source.float())
            count["restored"] += int((master == source.float()).sum())
            count["elements"] += item.length
            count["wrong_working"] += int((item.working.cpu() != master.cpu().to(dtype)).sum())
            count["wrong_moment"] += int((states["exp_avg"][back] != 0).sum())
            if item.param.ds_status.name == "AVAILABLE":
                whole = item.param.data.view(-1)[item.start : item.start + item.length]
                count["wrong_gathered"] += int((whole != item.working).sum())
        return found

    with mock.patch.object(Restoration, "apply", apply):
        command(recipe)
    return count

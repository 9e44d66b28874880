"""Jobs that watch a moving mask step by step."""

from __future__ import annotations

from typing import Any
from unittest import mock

from torch import Tensor

import forgetscale.engine.loop as loop
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

"""Leading singular directions of source weights, one matrix at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from forgetscale.api import Calibration
from forgetscale.methods.ssu.targets import Target
from forgetscale.ops.neighbours import top_directions


def leading_directions(
    calibration: Calibration, targets: Sequence[Target], rank: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return matrix name -> leading left and right singular vectors of its source weight, fp32.

    Ranks take matrices in turn; only the directions travel. Collective.

    Args:
        calibration: The source model.
        targets: Matrices.
        rank: Directions of each side, > 0; at most half of the smaller side is taken.
    """
    shards = calibration.shards()
    sides = {}
    for number, target in enumerate(targets):
        height, width = target.shape
        k = max(1, min(rank, min(height, width) // 2))
        found = torch.zeros(height + width, k)
        if number % shards.size == shards.rank:
            whole = calibration.read_source(target.name, 0, height * width)
            left, right = top_directions(whole.view(height, width).double(), k)
            found = torch.cat([left, right]).float()
        found = shards.all_reduce_sum(found)
        sides[target.name] = found[:height], found[height:]
    return sides

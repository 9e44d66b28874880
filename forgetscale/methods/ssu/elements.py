"""Element-wise freeze: single weights, the highest scores found exactly on slices.

Source: arXiv:2512.04844, element-wise ablation. ``paper`` is ``|W_ij| ||X_j||_2``; the published
code (gucci-j/ssu) uses ``|W_ij| (1 + mean_t x_tj^2)``, here ``official``, whose ``1 +`` makes it
nearly a magnitude ranking. That code ranks each tensor alone; ``scope: global`` is ours.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from forgetscale.api import Calibration, ParamShard
from forgetscale.masks import by_column
from forgetscale.methods.element_choice import choose_elements
from forgetscale.methods.ssu.targets import Target
from forgetscale.ops.importance import num_frozen


def element_scores(param: Tensor, start: int, statistic: Tensor | None, rule: str) -> Tensor:
    """Score the elements of one slice, in fp64 and rounded once to fp32.

    Args:
        param: Weights of the slice, ``[S]``.
        start: First element of the slice in the flattened matrix.
        statistic: One value per column: the input norm for ``paper``, the mean square for
            ``official``; None for magnitude rules.
        rule: ``paper``: ``|w| c``; ``official``: ``|w| (1 + c)``; ``mag_l1`` and ``mag_l2``:
            ``|w|`` (of a single element both norms are the same).
    """
    scores = param.double().abs_()
    if rule in ("paper", "official"):
        assert statistic is not None
        factor = statistic.to(scores.device, torch.float64)
        scores *= by_column(factor + 1.0 if rule == "official" else factor, start, param.numel())
    return scores.float()


def random_keys(name: str, start: int, length: int, seed: int, device: torch.device) -> Tensor:
    """Return one pseudo-random int32 key in ``0 .. 2**31 - 2`` per element of a slice.

    A key depends on the seed, the parameter's name and the element's place alone (the mixing of
    splitmix64), so any cut of the tensor gives the same keys.
    """
    digest = hashlib.sha256(f"ssu-rand-element/{seed}/{name}".encode()).digest()
    x = torch.arange(start, start + length, dtype=torch.int64, device=device)
    x += int.from_bytes(digest[:8], signed=True)
    x *= -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed number; products wrap around
    x ^= (x >> 30) & 0x3FFFFFFFF
    x *= -4658895280553007687  # 0xBF58476D1CE4E5B9
    x ^= (x >> 27) & 0x1FFFFFFFFF
    x *= -7723592293110705685  # 0x94D049BB133111EB
    x ^= (x >> 31) & 0x1FFFFFFFF
    return (x & 0x7FFFFFFF).clamp_(max=0x7FFFFFFE).to(torch.int32)


def frozen_elements(
    calibration: Calibration,
    targets: Sequence[Target],
    statistics: Mapping[str, Tensor],
    rule: str,
    frozen_fraction: float,
    scope: str,
) -> dict[str, Tensor]:
    """Return the bits of the elements to freeze, per matrix.

    Args:
        calibration: Source of slices and of the seed.
        targets: Matrices, in the model's order.
        statistics: Input statistic per parameter name, for rules that use one.
        rule: See ``element_scores``; ``rand`` draws by seed, name and place.
        frozen_fraction: Share of the elements of each matrix, or of all, truncated.
        scope: ``tensor`` or ``global``.

    Collective: every rank must call it.
    """

    def keys(shard: ParamShard) -> Tensor:
        if rule == "rand":
            length = shard.param.numel()
            return random_keys(
                shard.name, shard.start, length, calibration.seed, shard.param.device
            )
        statistic = statistics.get(shard.name)
        return element_scores(shard.param, shard.start, statistic, rule)

    sizes = {target.name: torch.Size(target.shape).numel() for target in targets}
    return choose_elements(
        calibration.shards(),
        sizes,
        lambda size: num_frozen(size, frozen_fraction),
        keys,
        scope=scope,
    )

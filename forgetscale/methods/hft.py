"""Half fine-tuning (HFT): whole matrices of each layer, drawn at random, never move.

Source: arXiv:2404.18466, with the counts of gucci-j/ssu ``_freeze_hft_parameters``. At one half
those are fixed; at another fraction that code searches, layer by layer, for numbers of attention
matrices, feed-forward matrices and norms whose parameters come closest to the fraction, and then
draws the members at random, so that the share that is frozen can differ from the one searched for.
It finds layer norms by LLaMA's names and so treats OLMo 2's two norms unequally; we draw from the
layer's two norms, whatever they are called. Embeddings, head, final norm and norms inside attention
are trained at any fraction: at 1 all matrices and layer norms are frozen.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Mapping, Sequence

from torch import nn

from forgetscale.api import Calibration, Unprotected
from forgetscale.config import HftMethodConfig
from forgetscale.masks import FreezePlan
from forgetscale.methods.structure import ATTENTION, FEED_FORWARD, decoder_layers, named_linears

GROUPS = ("attention", "feed_forward", "norm")


def group_counts(
    sizes: Mapping[str, Sequence[int]], num_parameters: int, frozen_fraction: float
) -> dict[str, int]:
    """Search how many members of each group to freeze in one layer.

    Start with the rounded share of each group, small members first up to one half and large ones
    above; add what is left over, in the same order, where that brings the sum closer to the target;
    if the sum is then too large, take out the one member whose absence brings it closest.

    Args:
        sizes: Group -> parameters of each member.
        num_parameters: Parameters of the layer.
        frozen_fraction: Share of them to freeze, in [0, 1].

    Returns:
        Group -> number of members.

    Source:
        gucci-j/ssu ``_freeze_hft_parameters``, ratios other than 0.5.
    """
    target = round(frozen_fraction * num_parameters)
    largest_first = frozen_fraction > 0.5
    chosen: list[tuple[str, int]] = []
    left: list[tuple[str, int]] = []
    for group, members in sizes.items():
        ordered = sorted(members, reverse=largest_first)
        count = round(frozen_fraction * len(ordered))
        chosen += [(group, size) for size in ordered[:count]]
        left += [(group, size) for size in ordered[count:]]
    total = sum(size for _, size in chosen)
    for group, size in sorted(left, key=lambda item: item[1], reverse=largest_first):
        if total < target and abs(target - total - size) <= abs(target - total):
            chosen.append((group, size))
            total += size
    if total > target and chosen:
        best = min(range(len(chosen)), key=lambda index: abs(total - chosen[index][1] - target))
        if abs(total - chosen[best][1] - target) < total - target:
            del chosen[best]
    counts = Counter(group for group, _ in chosen)
    return {group: counts[group] for group in sizes}


def draw_frozen(structure: nn.Module, seed: int, frozen_fraction: float = 0.5) -> frozenset[str]:
    """Return the names of the frozen parameters.

    At one half, per layer: 2 of the 4 attention matrices; 2 of the 3 feed-forward matrices in a
    random half of the layers and 1 in the others; 1 of the layer's 2 norms. Else ``group_counts``.

    Args:
        structure: The model (meta tensors will do).
        seed: Seed of the draw.
        frozen_fraction: Share of each layer's parameters to freeze, in [0, 1].

    Raises:
        ConfigError: The model has no layers of these seven matrices.
    """
    layers = decoder_layers(structure, "hft")
    generator = random.Random(int.from_bytes(hashlib.sha256(f"hft/{seed}".encode()).digest()[:8]))
    more = set(generator.sample(range(len(layers)), len(layers) // 2))
    frozen: list[str] = []
    for index, (prefix, layer) in enumerate(layers):
        linears = named_linears(layer, prefix, ATTENTION + FEED_FORWARD, "hft")
        norms = [
            (f"{prefix}.{name}", param.numel())
            for name, param in layer.named_parameters()
            if name.count(".") == 1 and name.endswith(".weight") and param.dim() == 1
        ]
        members = {
            "attention": [linears[name] for name in ATTENTION],
            "feed_forward": [linears[name] for name in FEED_FORWARD],
        }
        if frozen_fraction == 0.5:
            ffn = 2 if index in more else 1
            counts = {"attention": 2, "feed_forward": ffn, "norm": len(norms) // 2}
        else:
            sizes = {
                group: [module.weight.numel() for _, module in modules]
                for group, modules in members.items()
            }
            total = sum(param.numel() for param in layer.parameters())
            counts = group_counts(
                sizes | {"norm": [size for _, size in norms]}, total, frozen_fraction
            )
        for group in ("attention", "feed_forward"):
            drawn = generator.sample(members[group], counts[group])
            frozen += [f"{name}.weight" for name, _ in drawn]
        frozen += [name for name, _ in generator.sample(norms, counts["norm"])]
    return frozenset(frozen)


class Hft(Unprotected):
    """Freeze whole matrices.

    Args:
        config: Recipe section.
    """

    def __init__(self, config: HftMethodConfig) -> None:
        self._config = config

    def prepare(self, calibration: Calibration) -> FreezePlan:
        """Draw the plan from ``run.seed``."""
        fraction = self._config.frozen_fraction
        provenance = {
            "method": "hft",
            "frozen_fraction": fraction,
            "seed": calibration.seed,
            **calibration.provenance(),
        }
        return FreezePlan(
            whole=draw_frozen(calibration.structure, calibration.seed, fraction),
            provenance=provenance,
        )

"""Half fine-tuning (HFT): half of the matrices of each layer, drawn at random, never move.

Source: arXiv:2404.18466, with the draws of gucci-j/ssu ``_freeze_hft_parameters`` at one half.
That code finds layer norms by LLaMA's names and so treats OLMo 2's two norms unequally; we draw one
of the layer's two norms, whatever they are called.
"""

from __future__ import annotations

import hashlib
import random

from torch import nn

from forgetscale.api import Calibration, Unprotected
from forgetscale.config import HftMethodConfig
from forgetscale.errors import ConfigError
from forgetscale.masks import FreezePlan

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")


def _layers(structure: nn.Module) -> list[tuple[str, nn.Module]]:
    found = [
        (f"{name}.{index}", layer)
        for name, module in structure.named_modules()
        if isinstance(module, nn.ModuleList)
        for index, layer in enumerate(module)
    ]
    if not found:
        raise ConfigError("hft: the model has no list of decoder layers; this method cannot draw.")
    return found


def _named(layer: nn.Module, prefix: str, names: tuple[str, ...]) -> list[str]:
    found = {
        name.rpartition(".")[2]: f"{prefix}.{name}"
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear)
    }
    missing = [name for name in names if name not in found]
    if missing:
        raise ConfigError(
            f"hft: {prefix} has no linear layer {missing[0]!r} (it has {', '.join(sorted(found))});"
            " half fine-tuning is defined for models with these seven matrices."
        )
    return [found[name] for name in names]


def draw_half(structure: nn.Module, seed: int) -> frozenset[str]:
    """Return the names of the frozen parameters.

    Per layer 2 of the 4 attention matrices; 2 of the 3 feed-forward matrices in a random half of
    the layers and 1 in the others; 1 of the layer's 2 norms. Embeddings, head, final norm and
    norms inside attention are trained.

    Args:
        structure: The model (meta tensors will do).
        seed: Seed of the draw.
    """
    layers = _layers(structure)
    generator = random.Random(int.from_bytes(hashlib.sha256(f"hft/{seed}".encode()).digest()[:8]))
    more = set(generator.sample(range(len(layers)), len(layers) // 2))
    frozen: list[str] = []
    for index, (prefix, layer) in enumerate(layers):
        modules = generator.sample(_named(layer, prefix, ATTENTION), 2)
        modules += generator.sample(_named(layer, prefix, FEED_FORWARD), 2 if index in more else 1)
        frozen += [f"{module}.weight" for module in modules]
        norms = [
            f"{prefix}.{name}"
            for name, param in layer.named_parameters()
            if name.count(".") == 1 and name.endswith(".weight") and param.dim() == 1
        ]
        frozen += generator.sample(norms, len(norms) // 2)
    return frozenset(frozen)


class Hft(Unprotected):
    """Freeze half of the matrices.

    Args:
        config: Recipe section.
    """

    def __init__(self, config: HftMethodConfig) -> None:
        self._config = config

    def prepare(self, calibration: Calibration) -> FreezePlan:
        """Draw the plan from ``run.seed``."""
        provenance = {
            "method": "hft",
            "frozen_fraction": 0.5,
            "seed": calibration.seed,
            **calibration.provenance(),
        }
        return FreezePlan(
            whole=draw_half(calibration.structure, calibration.seed), provenance=provenance
        )

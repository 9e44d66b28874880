"""S2FT: train a few feed-forward channels, drawn at random over all layers; freeze the body else.

Source: arXiv:2412.06289, as run by gucci-j/ssu (``training/src/utils/s2ft.py``): one draw of
``floor(layers * channels * fraction)`` channels over the whole model, at least one; the input
columns of ``down_proj`` that read them are trained, everything else of the body is not. With
``variant: down_output`` whole attention heads are drawn the same way, and the columns of ``o_proj``
that read them are trained too. Embedding and head are trained there; ``ends: freeze`` freezes them.

The published code permutes the matrices so that the chosen channels lie side by side, trains an
added slice and must undo the permutation before export. A column plan names the columns where they
are: nothing is permuted, added or undone, and the exported model is an ordinary one. The plan is
known before training starts. Trained columns are the model's own fp32 masters and decay like other
weights, where the added slice of the published code decays towards the source weights.

``trainable_fraction`` 0.015 of OLMo 2 7B is 5,283 channels, 21.6 M weights, as many as LoRA of rank
8 on all projections; 0.03, 0.055 and 0.11 match ranks 16, 32 and 64.
"""

from __future__ import annotations

import hashlib
import random
from typing import Any

import torch
from torch import Tensor

from forgetscale.api import Calibration, Unprotected
from forgetscale.config import S2ftMethodConfig
from forgetscale.errors import ConfigError
from forgetscale.masks import FreezePlan
from forgetscale.methods.structure import (
    body_sizes,
    decoder_layers,
    end_parameters,
    named_linears,
)
from forgetscale.ops.importance import num_frozen as floor_share


def _draw(counts: list[int], fraction: float, generator: random.Random) -> list[list[int]]:
    """Draw a share of all members of all layers at once; return the members of each layer."""
    places = [(layer, member) for layer, count in enumerate(counts) for member in range(count)]
    size = floor_share(len(places), fraction)
    if fraction > 0:
        size = max(size, 1)
    found: list[list[int]] = [[] for _ in counts]
    for layer, member in sorted(generator.sample(places, size)):
        found[layer].append(member)
    return found


def _frozen_columns(width: int, trained: list[int], per_member: int) -> Tensor:
    keep = torch.ones(width // per_member, per_member, dtype=torch.bool)
    keep[trained] = False
    return keep.flatten().nonzero().flatten()


def draw_plan(
    structure: Any, seed: int, *, trainable_fraction: float, variant: str, ends: str
) -> tuple[dict[str, Tensor], frozenset[str]]:
    """Return the frozen columns by parameter, and the parameters that are frozen whole.

    Args:
        structure: Hugging Face causal language model (meta tensors will do).
        seed: Seed of the draw.
        trainable_fraction: Share of all channels (and heads), in [0, 1].
        variant: ``down`` or ``down_output``.
        ends: ``train`` or ``freeze`` for embedding and head.

    Raises:
        ConfigError: A layer has no ``down_proj`` (or ``o_proj``), or its heads cannot be told
            apart.
    """
    layers = decoder_layers(structure, "s2ft")
    digest = hashlib.sha256(f"s2ft/{seed}".encode()).digest()
    generator = random.Random(int.from_bytes(digest[:8]))
    columns: dict[str, Tensor] = {}
    names = ("down_proj",) if variant == "down" else ("down_proj", "o_proj")
    for name in names:
        modules = [named_linears(layer, prefix, (name,), "s2ft")[name] for prefix, layer in layers]
        groups = [1] * len(modules)
        if name == "o_proj":
            groups = [_head_width(structure, full, linear) for full, linear in modules]
        counts = [
            linear.in_features // size for (_, linear), size in zip(modules, groups, strict=True)
        ]
        drawn = _draw(counts, trainable_fraction, generator)
        for (full, linear), size, trained in zip(modules, groups, drawn, strict=True):
            if trained:
                columns[f"{full}.weight"] = _frozen_columns(linear.in_features, trained, size)
    whole = {name for name in body_sizes(structure) if name not in columns}
    if ends == "freeze":
        whole |= set(end_parameters(structure))
    return columns, frozenset(whole)


def _head_width(structure: Any, name: str, linear: Any) -> int:
    heads = getattr(structure.config, "num_attention_heads", 0)
    if not heads or linear.in_features % heads:
        raise ConfigError(
            f"s2ft: {name} has {linear.in_features} input columns and the model {heads} attention"
            " heads, so its heads cannot be told apart; use method.variant down."
        )
    return int(linear.in_features) // int(heads)


class S2ft(Unprotected):
    """Train drawn channels, freeze the rest of the body.

    Args:
        config: Recipe section.
    """

    def __init__(self, config: S2ftMethodConfig) -> None:
        self._config = config

    def prepare(self, calibration: Calibration) -> FreezePlan:
        """Draw the plan from ``run.seed``."""
        config = self._config
        columns, whole = draw_plan(
            calibration.structure,
            calibration.seed,
            trainable_fraction=config.trainable_fraction,
            variant=config.variant,
            ends=config.ends,
        )
        provenance = {
            "method": "s2ft",
            "trainable_fraction": config.trainable_fraction,
            "variant": config.variant,
            "ends": config.ends,
            "seed": calibration.seed,
            **calibration.provenance(),
        }
        return FreezePlan(columns=columns, whole=whole, provenance=provenance)

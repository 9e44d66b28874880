"""Write the factors of an adapter as the folder that PEFT's ``PeftModel.from_pretrained`` loads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from forgetscale.artifact import fsync_path, hash_file
from forgetscale.checkpoint.export import agreed_step, publish_folder
from forgetscale.config import (
    AdaloraMethodConfig,
    LoraAdapterConfig,
    Recipe,
    recipe_dict,
)
from forgetscale.masks import AdapterPair
from forgetscale.zero3 import ZeroEngine

KIND = "adapter_export"
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."


def target_names(adapters: Mapping[str, AdapterPair], linear: Sequence[str]) -> list[str]:
    """Return ``target_modules`` for PEFT, which takes names by their ends.

    Last names where they say exactly which layers are adapted, else whole names.

    Args:
        adapters: Adapted matrices.
        linear: Names of all two-dimensional weights of the source model.
    """
    chosen = {pair.module for pair in adapters.values()}
    leaves = sorted({name.rpartition(".")[2] for name in chosen})
    ended = {name for name in linear if name.rpartition(".")[2] in leaves}
    return leaves if ended == chosen else sorted(chosen)


def peft_config(
    recipe: Recipe, adapters: Mapping[str, AdapterPair], linear: Sequence[str]
) -> dict[str, Any]:
    """Return what ``adapter_config.json`` holds.

    Args:
        recipe: Resolved recipe with an ``adapter``.
        adapters: Adapted matrices.
        linear: Names of all two-dimensional weights of the source model, ``.weight`` removed.
    """
    section, method = recipe.adapter, recipe.method
    assert section is not None
    alpha = int(section.alpha) if section.alpha == int(section.alpha) else section.alpha
    found = {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(recipe.model.path),
        "inference_mode": True,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": section.dropout,
        "target_modules": target_names(adapters, linear),
    }
    if isinstance(section, LoraAdapterConfig):
        return found | {"peft_type": "LORA", "r": section.rank, "use_rslora": section.rslora}
    found |= {"peft_type": "ADALORA", "init_r": section.rank, "total_step": 1}
    if isinstance(method, AdaloraMethodConfig):
        # PEFT counts the final phase from the end; with one step after the last choice the
        # schedule it would resume with has the same first and last step.
        found |= {
            "target_r": method.target_rank,
            "tinit": method.shrink_from_step,
            "tfinal": 1,
            "total_step": method.shrink_until_step + 1,
            "deltaT": method.interval,
            "beta1": method.sensitivity_beta,
            "beta2": method.uncertainty_beta,
            "orth_reg_weight": method.orthogonality,
        }
    return found


def export_adapter(
    engine: ZeroEngine, *, recipe: Recipe, directory: Path, payload: Mapping[str, Any]
) -> None:
    """Write the fp32 masters of all factors and PEFT's configuration.

    Rank 0 holds all factors while it writes: at 70B, rank 16 and all linear layers 0.8 GB. Of SVD
    factors all triplets are written, those taken away with ``E = 0``: PEFT 0.21 warns of its own
    ``rank_pattern`` when it loads one.

    Args:
        engine: The model.
        recipe: Resolved recipe with an ``adapter``.
        directory: Target folder; an older adapter there is replaced.
        payload: Recorded in the manifest.

    Collective: every rank must call it.

    Raises:
        CheckpointError: A write failed; nothing half-written stays.
    """
    world, adapters = engine.world, engine.layout.adapters
    linear = [m.name.removesuffix(".weight") for m in engine.matrices() if len(m.shape) == 2]
    config = peft_config(recipe, adapters, linear)

    def write(folder: Path) -> dict[str, str]:
        tensors: dict[str, Tensor] = {}
        for pair in adapters.values():
            suffix = "" if pair.has_values else ".weight"
            for name, value in (engine.gather_factors(pair, 0) or {}).items():
                tensors[f"{_PREFIX}{name}{suffix}"] = value.cpu().contiguous()
        hashes: dict[str, str] = {}

        def save() -> None:
            if world.is_main:
                path = folder / WEIGHTS_FILE
                safetensors.torch.save_file(tensors, path, {"format": "pt"})
                fsync_path(path)
                hashes[path.name] = hash_file(path)

        agreed_step(world, directory, save)
        return hashes

    def finish(folder: Path) -> None:
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (folder / CONFIG_FILE).write_text(text, encoding="utf-8")

    publish_folder(
        world,
        directory,
        kind=KIND,
        write=write,
        finish=finish,
        payload=payload,
        recipe=recipe_dict(recipe),
    )

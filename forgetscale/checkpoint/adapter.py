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
from forgetscale.config import AdapterConfig, Recipe, recipe_dict
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
    section: AdapterConfig, adapters: Mapping[str, AdapterPair], linear: Sequence[str], base: str
) -> dict[str, Any]:
    """Return what ``adapter_config.json`` holds.

    Args:
        section: The recipe's ``adapter``.
        adapters: Adapted matrices.
        linear: Names of all two-dimensional weights of the source model, ``.weight`` removed.
        base: Path or name of the source model.
    """
    alpha = int(section.alpha) if section.alpha == int(section.alpha) else section.alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "r": section.rank,
        "lora_alpha": alpha,
        "lora_dropout": section.dropout,
        "use_rslora": section.rslora,
        "target_modules": target_names(adapters, linear),
    }


def export_adapter(
    engine: ZeroEngine, *, recipe: Recipe, directory: Path, payload: Mapping[str, Any]
) -> None:
    """Write the fp32 masters of all factors and PEFT's configuration.

    Rank 0 holds all factors while it writes: at 70B, rank 16 and all linear layers 0.8 GB.

    Args:
        engine: The model.
        recipe: Resolved recipe with an ``adapter``.
        directory: Target folder; an older adapter there is replaced.
        payload: Recorded in the manifest.

    Collective: every rank must call it.

    Raises:
        CheckpointError: A write failed; nothing half-written stays.
    """
    assert recipe.adapter is not None
    section, world, adapters = recipe.adapter, engine.world, engine.layout.adapters
    linear = [m.name.removesuffix(".weight") for m in engine.matrices() if len(m.shape) == 2]
    config = peft_config(section, adapters, linear, str(recipe.model.path))

    def write(folder: Path) -> dict[str, str]:
        tensors: dict[str, Tensor] = {}
        for pair in adapters.values():
            for name, value in (engine.gather_factors(pair, 0) or {}).items():
                tensors[f"{_PREFIX}{name}.weight"] = value.cpu().contiguous()
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

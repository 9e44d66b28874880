"""Small model folders as plain safetensors, and a restore of them in one line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from forgetscale.cli import main

SHAPES = {
    "model.embed_tokens.weight": (23, 12),
    "model.layers.0.self_attn.q_proj.weight": (12, 12),
    "model.layers.0.mlp.up_proj.weight": (31, 12),
    "model.layers.0.input_layernorm.weight": (12,),
    "model.layers.1.self_attn.q_proj.weight": (12, 12),
    "model.layers.1.mlp.up_proj.weight": (31, 12),
    "model.layers.10.mlp.up_proj.weight": (31, 12),
    "model.norm.weight": (12,),
    "lm_head.weight": (23, 12),
}


def write_folder(
    directory: Path, tensors: Mapping[str, Tensor], *, shards: int = 1, config: Any = None
) -> Path:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config or {"architectures": ["X"]}))
    (directory / "tokenizer.json").write_text("{}")
    names = list(tensors)
    if shards == 1:
        save_file(dict(tensors), directory / "model.safetensors", {"format": "pt"})
        return directory
    index = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        own = {name: tensors[name] for name in names[number::shards]}
        save_file(own, directory / file, {"format": "pt"})
        index |= dict.fromkeys(own, file)
    content = {"metadata": {"total_size": 1}, "weight_map": index}
    (directory / "model.safetensors.index.json").write_text(json.dumps(content))
    return directory


def source_tensors(dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {name: (0.05 * torch.randn(shape)).to(dtype) for name, shape in SHAPES.items()}


def tuned_tensors(source: Mapping[str, Tensor], step: float = 2e-3, seed: int = 1):
    torch.manual_seed(seed)
    return {
        name: (value.float() + step * torch.randn(value.shape)).to(value.dtype)
        for name, value in source.items()
    }


def restore(source: Path, tuned: Path | Sequence[Path], output: Path, *options: Any) -> int:
    folders = [tuned] if isinstance(tuned, Path) else list(tuned)
    given = ["--source", source, "--tuned", *folders, "--output", output]
    if "--workers" not in options:
        options = (*options, "--workers", 1)
    return main(["restore", *map(str, (*given, *options))])


def read_folder(directory: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        found |= load_file(file)
    return found


def weight_hashes(directory: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.glob("*.safetensors"))
    }

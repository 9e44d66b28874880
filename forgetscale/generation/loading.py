"""Model and tokenizer of a generation, and what identifies them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from forgetscale.artifact import canonical_json, hash_bytes, hash_file
from forgetscale.config import ModelConfig
from forgetscale.data import tokenizer_hash
from forgetscale.errors import ConfigError
from forgetscale.models import is_trusted, refuse_code


def require_model_folder(path: Path) -> None:
    """Refuse a folder that holds no model in safetensors.

    Raises:
        ConfigError: It does not.
    """
    if not (path / "config.json").is_file() or not any(path.glob("*.safetensors")):
        raise ConfigError(
            f"model.path: {path} is no Hugging Face model folder with config.json and .safetensors"
            " files; check the path."
        )


def load_tokenizer(path: Path) -> Any:
    """Load the tokenizer of a model folder; its own code runs only if trusted.

    Raises:
        DataError: There is none.
    """
    tokenizer_hash(path)
    refuse_code(path)
    return AutoTokenizer.from_pretrained(
        path, local_files_only=True, trust_remote_code=is_trusted(path)
    )


def load_causal_model(config: ModelConfig, device: str | None = None) -> Any:
    """Load the model in evaluation mode.

    Args:
        config: The recipe's ``model`` section.
        device: Torch device; None takes the GPU of this local rank if there is one, else the CPU.
    """
    if config.attn_implementation == "flash_attention_2":
        raise ConfigError(
            "model.attn_implementation is flash_attention_2, which takes no mask of slots; use sdpa"
            " for forgetscale generate."
        )
    model: Any = AutoModelForCausalLM.from_pretrained(
        config.path,
        dtype=getattr(torch, config.dtype),
        attn_implementation=config.attn_implementation,
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=is_trusted(config.path),
    )
    return model.eval().to(device or default_device())


def default_device() -> str:
    """Return the GPU of this local rank (``LOCAL_RANK``, ``SLURM_LOCALID``), else the CPU."""
    import os

    if not torch.cuda.is_available():
        return "cpu"
    local = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))
    return f"cuda:{int(local) % torch.cuda.device_count()}"


def stop_ids(path: Path, tokenizer: Any) -> tuple[int, ...]:
    """Return the end-of-sequence ids of the tokenizer and of the model's generation settings."""
    found: set[int] = set()
    if tokenizer.eos_token_id is not None:
        found.add(int(tokenizer.eos_token_id))
    if (path / "generation_config.json").is_file():
        value = GenerationConfig.from_pretrained(path, local_files_only=True).eos_token_id
        found |= set() if value is None else {value} if isinstance(value, int) else set(value)
    return tuple(sorted(found))


def model_hash(path: Path) -> str:
    """Return the SHA-256 over the configuration and every safetensors file of a model folder."""
    files = [path / "config.json", *sorted(path.glob("*.safetensors"))]
    return hash_bytes(canonical_json({item.name: hash_file(item) for item in files}))


def engine_fingerprint(config: ModelConfig, tokenizer: Any, kind: str) -> dict[str, Any]:
    """Return what decides the text beside the recipe: all workers of a run must agree."""
    return {
        "model": model_hash(config.path),
        "tokenizer": tokenizer_hash(config.path),
        "template": hash_bytes(str(tokenizer.chat_template).encode()),
        "dtype": config.dtype,
        "engine": kind,
        "torch": torch.__version__.partition("+")[0],
        "transformers": transformers.__version__,
    }

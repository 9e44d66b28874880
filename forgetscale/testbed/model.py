"""The tiny instruct model before any training: OLMo 2 architecture, random weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import GenerationConfig, Olmo2Config, Olmo2ForCausalLM

from forgetscale.testbed.size import WorldSize, derive_seed

MAX_POSITIONS = 256
INITIALIZER_RANGE = 0.08
"""About ``hidden_size ** -0.5``; the usual 0.02 is made for widths in the thousands."""


def save_initial_model(directory: Path, *, seed: int, size: WorldSize, vocab_size: int) -> int:
    """Write an ``Olmo2ForCausalLM`` with random fp32 weights as a Hugging Face folder.

    Args:
        directory: Folder to write into.
        seed: Seed of the world; torch's own random state is left as it was.
        size: Sizes of the model.
        vocab_size: Rows of the embedding and of the head, which are not tied.

    Returns:
        Number of parameters.
    """
    ids: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    config = Olmo2Config(
        vocab_size=vocab_size,
        hidden_size=size.hidden_size,
        intermediate_size=size.intermediate_size,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        num_key_value_heads=size.num_key_value_heads,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=False,
        initializer_range=INITIALIZER_RANGE,
        dtype="float32",
        **ids,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "model"))
        model = Olmo2ForCausalLM(config)
    config.architectures = ["Olmo2ForCausalLM"]
    config.save_pretrained(str(directory))
    generation: Callable[..., GenerationConfig] = GenerationConfig
    generation(do_sample=False, **ids).save_pretrained(str(directory))
    weights = {name: tensor.float().contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return int(sum(parameter.numel() for parameter in model.parameters()))

"""The engine that a recipe asks for."""

from __future__ import annotations

from forgetscale.config import GenerateRecipe
from forgetscale.generation.engines.base import Engine
from forgetscale.generation.engines.slots import SlotEngine
from forgetscale.generation.engines.vllm import open_vllm
from forgetscale.generation.loading import load_causal_model


def open_engine(recipe: GenerateRecipe, stop_ids: tuple[int, ...]) -> Engine:
    """Load the model into the engine of ``generate.engine``.

    Args:
        recipe: What is generated.
        stop_ids: End-of-sequence ids of the model.

    Raises:
        ConfigError: The engine is not installed or cannot run the model.
    """
    config = recipe.generate
    assert config.engine.kind != "zero3", "a group of ranks opens its own engine"
    if config.engine.kind == "vllm":
        return open_vllm(recipe)
    return SlotEngine(
        load_causal_model(recipe.model),
        num_slots=config.engine.num_slots,
        max_tokens=config.max_tokens,
    )

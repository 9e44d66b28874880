"""What methods need to know of a decoder's structure: layers, matrices, body and its ends."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from forgetscale.errors import ConfigError

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")


def decoder_layers(structure: nn.Module, method: str) -> list[tuple[str, nn.Module]]:
    """Return name and module of every decoder layer, in order.

    Args:
        structure: The model (meta tensors will do).
        method: Name of the method, for the message.

    Raises:
        ConfigError: The model has no list of layers.
    """
    found = [
        (f"{name}.{index}", layer)
        for name, module in structure.named_modules()
        if isinstance(module, nn.ModuleList)
        for index, layer in enumerate(module)
    ]
    if not found:
        raise ConfigError(
            f"{method}: the model has no list of decoder layers; this method cannot draw, use"
            " method.kind ssu or sft."
        )
    return found


def named_linears(
    layer: nn.Module, prefix: str, names: tuple[str, ...], method: str
) -> dict[str, tuple[str, nn.Linear]]:
    """Return the linear layers of a decoder layer by their short names.

    Args:
        layer: The decoder layer.
        prefix: Its name.
        names: Short names wanted, such as ``q_proj``.
        method: Name of the method, for the message.

    Returns:
        Short name -> (full module name, module), in the order of ``names``.

    Raises:
        ConfigError: A name is missing, as where projections are fused.
    """
    found = {
        name.rpartition(".")[2]: (f"{prefix}.{name}", module)
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear)
    }
    missing = [name for name in names if name not in found]
    if missing:
        raise ConfigError(
            f"{method}: {prefix} has no linear layer {missing[0]!r} (it has"
            f" {', '.join(sorted(found))}); this method is defined for models with {names[0]} to"
            f" {names[-1]}, use method.kind ssu or sft."
        )
    return {name: found[name] for name in names}


def end_parameters(structure: Any) -> list[str]:
    """Return the names of the parameters of embedding and output head, a tied one once."""
    ends = (structure.get_input_embeddings(), structure.get_output_embeddings())
    ids = {id(param) for module in ends for param in module.parameters()}
    return [name for name, param in structure.named_parameters() if id(param) in ids]


def body_sizes(structure: Any) -> dict[str, int]:
    """Return name -> elements of every parameter but embedding and head, in the model's order."""
    ends = set(end_parameters(structure))
    return {
        name: math.prod(param.shape)
        for name, param in structure.named_parameters()
        if name not in ends
    }

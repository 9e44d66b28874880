"""Build a Hugging Face causal language model without reading or allocating its weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.initialization import no_init_weights

from forgetscale.errors import DataError
from forgetscale.models.trust import is_trusted, refuse_code


def read_model_config(directory: Path, attn_implementation: str = "sdpa") -> PretrainedConfig:
    """Read ``config.json`` of a model folder; code in the folder runs only if it is trusted.

    Raises:
        ConfigError: The folder needs code and was not named for it.
        DataError: No folder, no config, or an architecture ``transformers`` does not know.
    """
    if not (Path(directory) / "config.json").is_file():
        raise DataError(f"model folder {directory} has no config.json; check model.path.")
    refuse_code(directory)
    try:
        config = AutoConfig.from_pretrained(
            directory, local_files_only=True, trust_remote_code=is_trusted(directory)
        )
    except (ValueError, OSError, KeyError) as error:
        first = str(error).splitlines()[0]
        raise DataError(f"{directory}/config.json cannot be used: {first}") from error
    assert isinstance(config, PretrainedConfig)
    config._attn_implementation = attn_implementation
    config.use_cache = False
    return config


def construct(config: PretrainedConfig) -> Any:
    """Construct the model class of ``config`` without initialising weights."""
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, trust_remote_code=is_trusted(config.name_or_path)
        )
    model.tie_weights()
    return model


def enable_checkpointing(model: Any) -> None:
    """Let a model compute each decoder layer again in backward instead of keeping its activations.

    Args:
        model: Hugging Face model; ``transformers`` renamed the call in 5.23.
    """
    arguments = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(arguments)
    else:
        model.gradient_checkpointing_enable(arguments)


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Let every parameter that is registered inside go to the meta device; buffers stay."""
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        original(module, name, param)
        # A parameter that is on the meta device already is a shared one: it must stay one object.
        if param is not None and not param.is_meta:
            meta = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
            module._parameters[name] = meta

    nn.Module.register_parameter = register  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


def build_skeleton(config: PretrainedConfig) -> Any:
    """Return the model with parameters on the meta device and real fp32 buffers.

    It costs no weight memory, and tells names, shapes, module types and the exact values of
    computed buffers such as rotary frequencies.
    """
    with parameters_on_meta():
        model = construct(config)
    return model.float() if any(p.dtype != torch.float32 for p in model.parameters()) else model


def parameter_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of every parameter, tied ones once, in the model's order."""
    return {name: tuple(param.shape) for name, param in model.named_parameters()}


def buffer_values(skeleton: nn.Module) -> dict[str, Tensor]:
    """Return the floating-point buffers of a skeleton by name."""
    return {n: b for n, b in skeleton.named_buffers() if b.is_floating_point()}


def restore_buffers(model: nn.Module, values: dict[str, Tensor], prefix: str = "") -> None:
    """Put computed buffers back in fp32.

    ``zero.Init`` and the bf16 engine cast every floating buffer, rotary frequencies included, to
    the model's type; from then on far positions are rotated by wrong angles. Plain
    ``transformers`` keeps these buffers in fp32, and so do we.

    Args:
        model: Model whose buffers were cast.
        values: Buffers by name, from ``build_skeleton``.
        prefix: What stands before the names in ``model``.
    """
    for name, value in values.items():
        owner, _, leaf = (prefix + name).rpartition(".")
        module = model.get_submodule(owner)
        old: Any = module._buffers[leaf]
        module._buffers[leaf] = value.to(device=old.device, dtype=torch.float32).clone()

"""The DeepSpeed JSON: what may stand there, and the full configuration made from it.

Only settings whose effect on frozen elements has a test are accepted. Everything else is refused
by name: a mode that moves gradients past the freeze plan would protect nothing and say nothing.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from forgetscale.config.recipe import Recipe
from forgetscale.errors import ConfigError

_OWNED = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size",
    "gradient_clipping": "optim.max_grad_norm",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "bfloat16": "model.dtype",
    "data_types": "train.accumulation_dtype",
    "optimizer": "optim",
    "scheduler": "optim.schedule",
    "activation_checkpointing": "model.activation_checkpointing",
}
_ALLOWED = {
    "zero_optimization",
    "communication_data_type",
    "steps_per_print",
    "wall_clock_breakdown",
    "comms_logger",
    "flops_profiler",
}
_ALLOWED_ZERO = {
    "stage",
    "overlap_comm",
    "contiguous_gradients",
    "reduce_bucket_size",
    "sub_group_size",
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
    "stage3_model_persistence_threshold",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "offload_optimizer",
}
_ALLOWED_OFFLOAD = {"device", "pin_memory"}


def _refuse_unknown(found: Mapping[str, Any], allowed: set[str], where: str, path: Path) -> None:
    for name in found:
        if name not in allowed:
            near = difflib.get_close_matches(name, sorted(allowed), n=1)
            hint = f" (nearest tested: {near[0]})" if near else ""
            raise ConfigError(
                f"deepspeed: {path}: {where}{name} is not tested with freeze plans{hint};"
                " remove it."
            )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object, refusing a key written twice (plain JSON keeps the last one silently)."""
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"key {name!r} stands twice")
    return dict(pairs)


def read_deepspeed(path: Path) -> dict[str, Any]:
    """Read and check the DeepSpeed JSON of a recipe.

    Raises:
        ConfigError: Unreadable, not stage 3, a setting the recipe owns, or an untested mode
            (SuperOffload, ZenFlow, MiCS, quantised gradients, parameter or NVMe offload ...).
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except OSError as error:
        raise ConfigError(
            f"deepspeed: {path} cannot be read ({error.strerror}); check the path."
        ) from error
    except ValueError as error:
        raise ConfigError(f"deepspeed: {path} is not valid JSON ({error}).") from error
    if not isinstance(found, dict):
        raise ConfigError(f"deepspeed: {path} must hold a JSON object.")
    for name, owner in _OWNED.items():
        if name in found:
            raise ConfigError(
                f"deepspeed: {path}: {name} belongs in the recipe ({owner}); remove it."
            )
    _refuse_unknown(found, _ALLOWED, "", path)
    zero = found.get("zero_optimization")
    if not isinstance(zero, dict) or zero.get("stage") != 3:
        stage = zero.get("stage") if isinstance(zero, dict) else None
        raise ConfigError(f"deepspeed: {path}: zero_optimization.stage is {stage}, expected 3.")
    _refuse_unknown(zero, _ALLOWED_ZERO, "zero_optimization.", path)
    offload = zero.get("offload_optimizer")
    if offload is not None:
        _refuse_unknown(offload, _ALLOWED_OFFLOAD, "zero_optimization.offload_optimizer.", path)
        if offload.get("device") not in ("cpu", "none"):
            raise ConfigError(
                f"deepspeed: {path}: offload_optimizer.device is {offload.get('device')!r},"
                " expected cpu or none; other devices are not tested with freeze plans."
            )
    return found


def accumulation_steps(recipe: Recipe, world_size: int) -> int:
    """Return micro-batches per step and rank, equal on all ranks: ``ceil(ceil(G / W) / micro)``."""
    rows = -(-recipe.train.global_batch_size // world_size)
    return -(-rows // recipe.train.micro_batch_size)


def engine_config(recipe: Recipe, world_size: int) -> dict[str, Any]:
    """Return the configuration given to ``deepspeed.initialize``.

    Args:
        recipe: Resolved recipe.
        world_size: Number of ranks.
    """
    config = read_deepspeed(recipe.deepspeed)
    micro = recipe.train.micro_batch_size
    steps = accumulation_steps(recipe, world_size)
    config |= {
        "train_batch_size": micro * steps * world_size,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": steps,
        "gradient_clipping": recipe.optim.max_grad_norm,
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }
    config.setdefault("steps_per_print", 10**9)
    if recipe.model.dtype == "bfloat16":
        config["bf16"] = {"enabled": True}
        short = {"float32": "fp32", "bfloat16": "bf16"}[recipe.train.accumulation_dtype]
        config["data_types"] = {"grad_accum_dtype": short}
    return config

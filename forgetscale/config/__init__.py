"""Recipes: dataclasses, loading, overrides, checks. Imports no torch."""

from forgetscale.config.load import (
    apply_overrides,
    dump_recipe,
    load_recipe,
    read_yaml,
    recipe_dict,
    validate_recipe,
)
from forgetscale.config.recipe import (
    CalibrationConfig,
    EvaluateConfig,
    HftMethodConfig,
    ModelConfig,
    OptimConfig,
    Recipe,
    RunConfig,
    SftMethodConfig,
    SsuMethodConfig,
    TokenDataConfig,
    TrainConfig,
)

__all__ = [
    "CalibrationConfig",
    "EvaluateConfig",
    "HftMethodConfig",
    "ModelConfig",
    "OptimConfig",
    "Recipe",
    "RunConfig",
    "SftMethodConfig",
    "SsuMethodConfig",
    "TokenDataConfig",
    "TrainConfig",
    "apply_overrides",
    "dump_recipe",
    "load_recipe",
    "read_yaml",
    "recipe_dict",
    "validate_recipe",
]

"""Recipes: dataclasses, loading, overrides, checks. Imports no torch."""

from forgetscale.config.adapters import ADAPTED_METHODS, AdapterConfig, LoraAdapterConfig
from forgetscale.config.data import (
    DataConfig,
    MixtureDataConfig,
    MixtureSetConfig,
    SftDataConfig,
    TokenDataConfig,
)
from forgetscale.config.load import (
    apply_overrides,
    dump_recipe,
    load_recipe,
    read_yaml,
    recipe_dict,
    validate_recipe,
)
from forgetscale.config.losses import (
    CrossEntropyLossConfig,
    EaftLossConfig,
    LossConfig,
)
from forgetscale.config.methods import (
    DATA_SCORES,
    SCORES,
    CalibrationConfig,
    FisherConfig,
    GmtMethodConfig,
    HftMethodConfig,
    LotaMethodConfig,
    S2ftMethodConfig,
    SftMethodConfig,
    SsuMethodConfig,
)
from forgetscale.config.recipe import (
    EvaluateConfig,
    ModelConfig,
    OptimConfig,
    Recipe,
    RunConfig,
    TrainConfig,
)

__all__ = [
    "ADAPTED_METHODS",
    "AdapterConfig",
    "CalibrationConfig",
    "CrossEntropyLossConfig",
    "DATA_SCORES",
    "DataConfig",
    "EaftLossConfig",
    "EvaluateConfig",
    "FisherConfig",
    "GmtMethodConfig",
    "HftMethodConfig",
    "LoraAdapterConfig",
    "LossConfig",
    "LotaMethodConfig",
    "S2ftMethodConfig",
    "MixtureDataConfig",
    "MixtureSetConfig",
    "ModelConfig",
    "OptimConfig",
    "Recipe",
    "RunConfig",
    "SCORES",
    "SftMethodConfig",
    "SsuMethodConfig",
    "SftDataConfig",
    "TokenDataConfig",
    "TrainConfig",
    "apply_overrides",
    "dump_recipe",
    "load_recipe",
    "read_yaml",
    "recipe_dict",
    "validate_recipe",
]

from __future__ import annotations

from types import SimpleNamespace

import pytest

from forgetscale.config import FreezeLayersMethodConfig
from forgetscale.errors import ConfigError
from forgetscale.methods import METHODS
from tests.distributed.tiny import olmo2


def frozen(tied: bool = False, **fields) -> tuple[frozenset[str], set[str]]:
    model = olmo2(tied)
    config = FreezeLayersMethodConfig(kind="freeze_layers", **fields)
    calibration = SimpleNamespace(structure=model, provenance=dict, seed=1)
    plan = METHODS["freeze_layers"](config).prepare(calibration)
    return plan.whole, {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize(("count", "trained"), [(1, "model.layers.1."), (-1, "model.layers.0.")])
def test_one_layer_at_either_end_is_trained(count: int, trained: str) -> None:
    whole, names = frozen(trainable_layers=count)
    assert names - whole == {name for name in names if name.startswith(trained)}


@pytest.mark.parametrize("tied", [False, True])
def test_ends_may_be_trained_too(tied: bool) -> None:
    whole, names = frozen(tied, trainable_layers=1, ends="train")
    assert whole == {name for name in names if name.startswith("model.layers.0.")}
    assert not frozen(tied, trainable_layers=2, ends="train")[0]


def test_more_layers_than_there_are_and_none_at_all_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"trainable_layers is 3, but the model has 2 layers"):
        frozen(trainable_layers=3)
    with pytest.raises(ValueError, match="must not be 0"):
        FreezeLayersMethodConfig(kind="freeze_layers", trainable_layers=0)

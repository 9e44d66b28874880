"""The recipe's ``adapter``: what is accepted, and one sentence for each mistake."""

from __future__ import annotations

import pytest

from forgetscale.config import recipe_dict, validate_recipe
from forgetscale.errors import ConfigError

GOOD = {
    "run": {"name": "a", "output_dir": "runs/a"},
    "model": {"path": "models/m"},
    "data": {"path": "data/d"},
    "method": {"kind": "sft"},
    "train": {"num_steps": 10},
    "deepspeed": "ds_configs/zero3.json",
    "adapter": {"kind": "lora"},
}


def sentence(**changes: object) -> str:
    with pytest.raises(ConfigError) as caught:
        validate_recipe(GOOD | changes)
    return str(caught.value)


def test_defaults_and_scale():
    section = validate_recipe(GOOD).adapter
    assert (section.rank, section.alpha, section.scale) == (8, 16.0, 2.0)
    assert section.target_modules == "all-linear"
    root = validate_recipe(GOOD | {"adapter": {"kind": "lora", "rslora": True}}).adapter
    assert root.scale == pytest.approx(16 / 8**0.5, rel=1e-15)
    assert recipe_dict(validate_recipe(GOOD | {"adapter": None}))["adapter"] is None


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"rank": 0}, "rank must be > 0, got 0"),
        ({"alpha": -1}, "alpha must be finite and > 0, got -1"),
        ({"dropout": 1.0}, "dropout must lie in [0, 1), got 1.0"),
        ({"target_modules": []}, "target_modules is empty"),
        ({"rang": 4}, "adapter.rang is not a recipe field"),
        ({"init": "zero"}, "adapter.init"),
    ],
)
def test_wrong_values(change: dict, expected: str):
    assert expected in sentence(adapter={"kind": "lora", **change})


@pytest.mark.parametrize(
    "method", [{"kind": "hft"}, {"kind": "ssu", "score": "rand"}, {"kind": "gmt"}]
)
def test_methods_that_choose_weights_are_refused(method: dict):
    found = sentence(method=method)
    assert f"method.kind {method['kind']} chooses which weights stay" in found
    assert "mean nothing by themselves" in found and "Set method.kind to sft" in found


ADALORA = {"kind": "adalora", "shrink_until_step": 8}


@pytest.mark.parametrize(
    ("method", "adapter", "expected"),
    [
        (ADALORA, None, "set adapter.kind to svd, got no adapter"),
        (ADALORA, {"kind": "lora"}, "set adapter.kind to svd, got lora"),
        (ADALORA | {"target_rank": 13}, {"kind": "svd"}, "target_rank is 13, but adapter.rank"),
        (ADALORA | {"shrink_until_step": 10}, {"kind": "svd"}, "so no step of train.num_steps 10"),
        (ADALORA | {"shrink_from_step": 9}, {"kind": "svd"}, "before shrink_until_step, got 9 and"),
        (ADALORA | {"interval": 0}, {"kind": "svd"}, "interval must be > 0, got 0"),
    ],
)
def test_adalora_needs_factors_it_can_shrink(method: dict, adapter: dict | None, expected: str):
    assert expected in sentence(method=method, adapter=adapter)


def test_svd_scale_is_pefts():
    section = validate_recipe(GOOD | {"adapter": {"kind": "svd"}}).adapter
    assert section.scale == 32 / (12 + 1e-5)


def test_any_loss_goes_with_an_adapter():
    recipe = validate_recipe(GOOD | {"method": {"kind": "sft", "loss": {"kind": "eaft"}}})
    assert recipe.method.loss.kind == "eaft"


def test_evaluation_needs_the_merged_model():
    found = sentence(
        adapter={"kind": "lora", "merge": False},
        evaluate={"tasks": ["recall"], "task_dir": "tasks"},
    )
    assert "adapter.merge must be true" in found

"""Half fine-tuning: what is drawn, and models it is not defined for."""

from __future__ import annotations

import pytest
from torch import nn
from transformers import Olmo2Config, Olmo2ForCausalLM

from forgetscale.config import HftMethodConfig
from forgetscale.errors import ConfigError
from forgetscale.methods import METHODS
from forgetscale.methods.hft import draw_half


@pytest.fixture(scope="module")
def model():
    return Olmo2ForCausalLM(
        Olmo2Config(
            vocab_size=20,
            hidden_size=8,
            intermediate_size=12,
            num_hidden_layers=6,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    )


@pytest.mark.parametrize("seed", range(6))
def test_half_of_each_kind_in_each_layer(model, seed: int):
    frozen = draw_half(model, seed)
    assert frozen <= {name for name, _ in model.named_parameters()}
    feed_forward = []
    for layer in range(6):
        inside = [n for n in frozen if n.startswith(f"model.layers.{layer}.")]
        assert sum(".self_attn." in n for n in inside) == 2
        assert sum(n.endswith("layernorm.weight") for n in inside) == 1
        feed_forward.append(sum(".mlp." in n for n in inside))
    assert sorted(feed_forward) == [1, 1, 1, 2, 2, 2]
    assert not any("_norm" in n for n in frozen), "norms inside attention are trained"
    assert len(frozen) == sum(n.startswith("model.layers.") for n in frozen)


def test_the_draw_depends_on_the_seed_alone(model):
    assert draw_half(model, 1) == draw_half(model, 1)
    assert len({draw_half(model, seed) for seed in range(5)}) == 5


def test_every_matrix_is_drawn_sometimes(model):
    drawn = set().union(*(draw_half(model, seed) for seed in range(60)))
    matrices = {n for n, p in model.named_parameters() if "_proj" in n}
    assert matrices <= drawn


def test_plan(calibration, model):
    calibration.structure = model
    plan = METHODS["hft"](HftMethodConfig(kind="hft")).prepare(calibration)
    assert plan is not None and plan.whole == draw_half(model, calibration.seed)
    assert not plan.columns and not plan.rows
    assert calibration.passes == 0


def test_models_it_is_not_defined_for(calibration, body):
    with pytest.raises(ConfigError, match="has no list of decoder layers"):
        draw_half(body, 1)
    body.layers = nn.ModuleList([nn.Sequential()])
    body.layers[0].add_module("q_proj", nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="layers.0 has no linear layer 'k_proj' .it has q_proj"):
        draw_half(body, 1)

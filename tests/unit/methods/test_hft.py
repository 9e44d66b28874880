"""Half fine-tuning: what is drawn, and models it is not defined for."""

from __future__ import annotations

import pytest
from torch import nn
from transformers import Olmo2Config, Olmo2ForCausalLM

from forgetscale.config import HftMethodConfig
from forgetscale.errors import ConfigError
from forgetscale.methods import METHODS
from forgetscale.methods.hft import draw_frozen, group_counts


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
    frozen = draw_frozen(model, seed)
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
    assert draw_frozen(model, 1) == draw_frozen(model, 1)
    assert len({draw_frozen(model, seed) for seed in range(5)}) == 5


def test_every_matrix_is_drawn_sometimes(model):
    drawn = set().union(*(draw_frozen(model, seed) for seed in range(60)))
    matrices = {n for n, p in model.named_parameters() if "_proj" in n}
    assert matrices <= drawn


class TestOtherFractions:
    """Counts by hand for a layer of 4 x 10, 3 x 30 and 2 x 1 parameters, 132 in all."""

    sizes = {"attention": [10] * 4, "feed_forward": [30] * 3, "norm": [1] * 2}

    @pytest.mark.parametrize(
        ("fraction", "counts"),
        [
            # Target 33: 1 + 1 + 0 rounded, sum 40; without the attention matrix 30 is closer.
            (0.25, (0, 1, 0)),
            # Target 99: 3 + 2 + 2 rounded, sum 92; adding 30 overshoots by 23, adding 10 by 3;
            # without one norm by 2.
            (0.75, (4, 2, 1)),
            (0.0, (0, 0, 0)),
            (1.0, (4, 3, 2)),
            # Target 13: no group rounds up; norms first (1, 1), then one matrix of 10.
            (0.1, (1, 0, 2)),
        ],
    )
    def test_counts(self, fraction: float, counts: tuple[int, int, int]):
        found = group_counts(self.sizes, 132, fraction)
        assert tuple(found.values()) == counts

    @pytest.mark.parametrize("fraction", [0.125, 0.25, 0.375, 0.625, 0.75, 0.875])
    def test_every_layer_is_frozen_at_about_the_fraction(self, model, fraction: float):
        frozen = draw_frozen(model, 1, fraction)
        params = dict(model.named_parameters())
        assert frozen <= set(params)
        for layer in range(6):
            prefix = f"model.layers.{layer}."
            total = sum(p.numel() for n, p in params.items() if n.startswith(prefix))
            share = sum(params[n].numel() for n in frozen if n.startswith(prefix)) / total
            # The smallest matrix is a tenth of a layer here, the largest a fifth.
            assert abs(share - fraction) < 0.16, (layer, share)

    def test_ends_of_the_range(self, model):
        assert draw_frozen(model, 1, 0.0) == frozenset()
        everything = draw_frozen(model, 1, 1.0)
        matrices = {n for n, _ in model.named_parameters() if "_proj" in n}
        assert matrices <= everything and "model.norm.weight" not in everything

    @pytest.mark.parametrize("fraction", [-0.1, 1.5])
    def test_outside_the_range(self, fraction: float):
        with pytest.raises(ValueError, match=r"frozen_fraction must lie in \[0, 1\]"):
            HftMethodConfig(kind="hft", frozen_fraction=fraction)


def test_plan(calibration, model):
    calibration.structure = model
    plan = METHODS["hft"](HftMethodConfig(kind="hft")).prepare(calibration)
    assert plan is not None and plan.whole == draw_frozen(model, calibration.seed)
    assert not plan.columns and not plan.rows
    assert calibration.passes == 0


def test_models_it_is_not_defined_for(calibration, body):
    with pytest.raises(ConfigError, match="has no list of decoder layers"):
        draw_frozen(body, 1)
    body.layers = nn.ModuleList([nn.Sequential()])
    body.layers[0].add_module("q_proj", nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="layers.0 has no linear layer 'k_proj' .it has q_proj"):
        draw_frozen(body, 1)

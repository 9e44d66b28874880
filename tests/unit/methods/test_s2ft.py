"""S2FT: which columns are drawn, what stays frozen, models it is not defined for."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import Olmo2Config, Olmo2ForCausalLM

from forgetscale.config import S2ftMethodConfig
from forgetscale.errors import ConfigError
from forgetscale.methods import METHODS
from forgetscale.methods.s2ft import draw_plan

LAYERS, WIDTH, HEADS, HEAD_WIDTH = 5, 12, 4, 2


@pytest.fixture(scope="module")
def model():
    return Olmo2ForCausalLM(
        Olmo2Config(
            vocab_size=20,
            hidden_size=8,
            intermediate_size=WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=2,
        )
    )


def trained(model, **settings) -> dict[str, list[int]]:
    """Return the trained columns of every parameter that is not frozen whole."""
    settings = {"trainable_fraction": 0.3, "variant": "down", "ends": "train"} | settings
    columns, whole = draw_plan(model, settings.pop("seed", 1), **settings)
    found = {}
    for name, param in model.named_parameters():
        if name not in whole:
            frozen = set(columns[name].tolist()) if name in columns else set()
            found[name] = [c for c in range(param.shape[-1]) if c not in frozen]
    assert set(columns).isdisjoint(whole)
    return found


@pytest.mark.parametrize("seed", range(5))
def test_a_share_of_all_channels_over_all_layers(model, seed: int):
    found = trained(model, seed=seed)
    ends = {"model.embed_tokens.weight", "lm_head.weight"}
    assert ends <= set(found)
    downs = {name: columns for name, columns in found.items() if name not in ends}
    assert all(name.endswith("down_proj.weight") for name in downs)
    assert sum(map(len, downs.values())) == int(LAYERS * WIDTH * 0.3)


def test_layers_get_different_numbers(model):
    sizes = {tuple(map(len, trained(model, seed=seed).values())) for seed in range(4)}
    assert len(sizes) > 1


def test_heads_are_whole(model):
    found = trained(model, variant="down_output")
    outputs = {n: c for n, c in found.items() if n.endswith("o_proj.weight")}
    assert sum(map(len, outputs.values())) == int(LAYERS * HEADS * 0.3) * HEAD_WIDTH
    for columns in outputs.values():
        assert columns == [h + i for h in columns[::HEAD_WIDTH] for i in range(HEAD_WIDTH)]
        assert all(first % HEAD_WIDTH == 0 for first in columns[::HEAD_WIDTH])
    down = {n: c for n, c in found.items() if n.endswith("down_proj.weight")}
    assert down == {n: c for n, c in trained(model).items() if n.endswith("down_proj.weight")}, (
        "the heads are drawn after the channels, which stay the same"
    )


def test_frozen_ends(model):
    assert all(name.endswith("down_proj.weight") for name in trained(model, ends="freeze"))
    with pytest.raises(ValueError, match="nothing would be trained"):
        S2ftMethodConfig(kind="s2ft", trainable_fraction=0.0, ends="freeze")


def test_small_shares_train_at_least_one_channel(model):
    found = trained(model, trainable_fraction=1e-6, ends="freeze")
    assert list(map(len, found.values())) == [1]
    assert trained(model, trainable_fraction=0.0).keys() == {
        "model.embed_tokens.weight",
        "lm_head.weight",
    }


def test_published_count():
    # 5,283 channels of OLMo 2 7B at 0.015.
    from forgetscale.ops.importance import num_frozen

    assert num_frozen(32 * 11008, 0.015) == 5283
    assert 5283 * 4096 == 21_639_168


def test_plan(calibration, model):
    calibration.structure = model
    method = METHODS["s2ft"](S2ftMethodConfig(kind="s2ft", trainable_fraction=0.2))
    plan = method.prepare(calibration)
    assert calibration.passes == 0
    shapes = {name: tuple(param.shape) for name, param in model.named_parameters()}
    plan.check_model(shapes)
    total = sum(torch.Size(shape).numel() for shape in shapes.values())
    ends = 2 * 20 * 8
    assert total - plan.num_frozen(shapes) == ends + int(LAYERS * WIDTH * 0.2) * 8
    assert plan.provenance["trainable_fraction"] == 0.2 and plan.provenance["seed"] == 3


def test_models_it_is_not_defined_for(body, model):
    with pytest.raises(ConfigError, match="no list of decoder layers.* use method.kind ssu or sft"):
        trained(body)
    body.layers = nn.ModuleList([nn.Sequential()])
    body.layers[0].add_module("fused", nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="layers.0 has no linear layer 'down_proj' .it has fused"):
        trained(body)
    model.config.num_attention_heads, heads = 3, model.config.num_attention_heads
    with pytest.raises(ConfigError, match="8 input columns and the model 3 attention heads"):
        trained(model, variant="down_output")
    model.config.num_attention_heads = heads

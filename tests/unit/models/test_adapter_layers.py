"""Layers with factors: values, gradients, targets, first values."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from forgetscale.errors import ConfigError
from forgetscale.masks import AdapterPair
from forgetscale.models import adapter_pairs, build_skeleton, make_adapters, read_model_config
from forgetscale.models.adapters import LoraLinear, initial_values, uniform_slice

OUT, IN, R, SCALE = 6, 9, 2, 1.5
PAIR = AdapterPair("q_proj.weight", (OUT, IN), R, SCALE)


def make_layer(bias: bool, dropout: float = 0.0) -> tuple[LoraLinear, nn.Linear]:
    torch.manual_seed(3)
    linear = nn.Linear(IN, OUT, bias=bias).double()
    layer = LoraLinear(linear, AdapterPair("q_proj.weight", (OUT, IN), R, SCALE, dropout))
    layer.take_over(linear)
    with torch.no_grad():
        layer.lora_A.copy_(torch.randn(R, IN))
        layer.lora_B.copy_(torch.randn(OUT, R))
    return layer, linear


@pytest.mark.parametrize("bias", [False, True])
def test_forward_and_gradients_are_those_of_the_sum(bias: bool):
    layer, linear = make_layer(bias)
    x = torch.randn(2, 5, IN, dtype=torch.float64, requires_grad=True)
    a, b = layer.lora_A.detach().requires_grad_(), layer.lora_B.detach().requires_grad_()
    weight = linear.weight.detach() + SCALE * b @ a
    expected = nn.functional.linear(x, weight, linear.bias)
    found = layer(x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    g = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, (x, a, b), g)
    given = torch.autograd.grad(found, (x, layer.lora_A, layer.lora_B), g)
    for one, other in zip(given, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert not layer.weight.requires_grad
    assert layer.weight is linear.weight, "taken over, not copied"


def test_only_factors_get_gradients_with_and_without_bias():
    layer, _ = make_layer(bias=True)
    layer(torch.randn(3, IN, dtype=torch.float64)).sum().backward()
    with_grad = {name for name, p in layer.named_parameters() if p.grad is not None}
    assert with_grad == {"lora_A", "lora_B"}


def test_dropout_hides_inputs_from_the_factors_alone():
    layer, linear = make_layer(bias=True, dropout=0.5)
    x = torch.ones(4, IN, dtype=torch.float64)
    layer.eval()
    with torch.no_grad():
        whole = layer(x)
        layer.lora_B.zero_()
        base = layer(x)
    layer.train()
    torch.testing.assert_close(layer(x), base, rtol=0, atol=0)
    assert not torch.equal(whole, base)


def test_the_update_is_known_up_to_a_change_of_basis_only():
    a, b = torch.randn(R, IN).double(), torch.randn(OUT, R).double()
    turned = torch.randn(R, R).double()
    one = PAIR.delta({PAIR.lora_A: a, PAIR.lora_B: b})
    other = PAIR.delta({PAIR.lora_A: torch.linalg.inv(turned) @ a, PAIR.lora_B: b @ turned})
    torch.testing.assert_close(one, other)
    torch.testing.assert_close(one, SCALE * b @ a)
    half = AdapterPair(PAIR.matrix, PAIR.shape, R, SCALE / 2)
    torch.testing.assert_close(half.delta({PAIR.lora_A: a, PAIR.lora_B: 2 * b}), one)


@pytest.fixture(scope="module")
def skeleton(plain):
    return build_skeleton(read_model_config(plain))


def pairs(skeleton, targets, rank: int = 2):
    return adapter_pairs(skeleton, targets, rank=rank, scale=1.0, dropout=0.0)


def test_targets(skeleton):
    everything = pairs(skeleton, "all-linear")
    assert len(everything) == 14 and "lm_head.weight" not in everything
    ends = pairs(skeleton, ["v_proj", "layers.1.mlp.up_proj"])
    assert list(ends) == [
        "model.layers.0.self_attn.v_proj.weight",
        "model.layers.1.self_attn.v_proj.weight",
        "model.layers.1.mlp.up_proj.weight",
    ]


@pytest.mark.parametrize(
    ("targets", "rank", "expected"),
    [
        (["q_prj"], 2, "'q_prj' matches no linear layer of the model (nearest: q_proj)"),
        (["proj"], 2, "matches no linear layer"),
        (["lm_head"], 2, "the output head"),
        (["embed_tokens"], 2, "matches no linear layer"),
        ("all-linear", 13, "has 12 out and 35 in features"),
    ],
)
def test_targets_that_cannot_be(skeleton, targets, rank: int, expected: str):
    with pytest.raises(ConfigError) as caught:
        pairs(skeleton, targets, rank)
    assert expected in str(caught.value)


def test_names_of_the_source_model_stay(plain):
    model = AutoModelForCausalLM.from_pretrained(plain)
    before = [name for name, _ in model.named_parameters()]
    found = pairs(model, "all-linear")
    make_adapters(model, found)
    after = [name for name, _ in model.named_parameters() if ".lora_" not in name]
    assert sorted(after) == sorted(before)
    factors = {n: s for pair in found.values() for n, s in pair.factor_shapes().items()}
    built = {n: tuple(p.shape) for n, p in model.named_parameters() if ".lora_" in n}
    assert built == factors


def test_draws_follow_philox_and_need_nothing_before_them():
    whole = uniform_slice("a key", 0, 1000)
    for start, length in ((0, 7), (1, 7), (3, 1), (4, 0), (513, 487), (998, 2)):
        assert torch.equal(uniform_slice("a key", start, length), whole[start : start + length])
    key = int.from_bytes(hashlib.sha256(b"a key").digest()[:16], "little")
    raw = np.random.Philox(key=key).random_raw(1000)
    expected = ((raw >> np.uint64(11)).astype(np.float64) + 0.5) / 2**53
    assert np.array_equal(whole.numpy(), expected)
    assert not torch.equal(whole, uniform_slice("another", 0, 1000))


@pytest.mark.parametrize(
    ("init", "deviation"), [("kaiming", 1 / (3 * IN) ** 0.5), ("gaussian", 0.5)]
)
def test_first_values(init: str, deviation: float):
    pair = AdapterPair("q_proj.weight", (OUT, IN), R, SCALE)
    values = initial_values(pair, pair.lora_A, 0, 20_000, seed=1, init=init)
    assert float(values.std()) == pytest.approx(deviation, rel=0.03)
    assert abs(float(values.mean())) < 0.03 * deviation + 0.005
    again = initial_values(pair, pair.lora_A, 100, 50, seed=1, init=init)
    assert torch.equal(again, values[100:150])
    other = initial_values(pair, pair.lora_A, 0, 20, seed=2, init=init)
    assert not torch.equal(other, values[:20])
    assert not initial_values(pair, pair.lora_B, 0, 20, seed=1, init=init).any()


@pytest.mark.parametrize(
    ("targets", "millions"), [(["q_proj", "v_proj"], 3.408), ("all-linear", 20.97)]
)
def test_sizes_of_an_8b_model(targets, millions: float):
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=1,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=64,
    )
    found = pairs(build_skeleton(config), targets, rank=8)
    count = sum(a * b for pair in found.values() for a, b in pair.factor_shapes().values())
    assert 32 * count == pytest.approx(millions * 1e6, rel=1e-3)

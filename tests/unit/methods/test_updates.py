"""SPD and MoFO on two slices of one process: worked numbers, conditions, exact counts."""

from __future__ import annotations

import math

import pytest
import torch

from forgetscale.api import ParamShard
from forgetscale.config import MofoMethodConfig, SpdMethodConfig
from forgetscale.methods.mofo import Mofo
from forgetscale.methods.spd import Spd, pull_share


class Shards:
    """One rank that owns whole tensors; ``moments`` stand in for Adam's."""

    size, rank, lr, adapters = 1, 0, 0.1, {}

    def __init__(self, params, grads, moments=None, decay=0.0):
        self.params, self.grads, self.moments, self.decay = params, grads, moments, decay

    def __iter__(self):
        for name, param in self.params.items():
            yield ParamShard(name, tuple(param.shape), 0, self.grads[name].view(-1), param.view(-1))

    def all_reduce_sum(self, value):
        return value

    def momentum(self, name):
        return self.moments[name].view(-1)


class Source:
    """Where SPD reads the source weights."""

    def __init__(self, values):
        self.values = values

    def read_source(self, name, start, length):
        return self.values[name].view(-1)[start : start + length]


def test_the_share_that_is_pulled():
    before, after = torch.tensor([3.0, 5.0, 0.0, 2.0]), torch.tensor([5.0, 3.0, 0.0, 2.0])
    assert pull_share(before, after).tolist() == pytest.approx([0.4, 0.0, 0.0, 0.0])


def spd_step(grad, strength=1.0):
    """From (3, 0) to (3, 4), the source at 0: the distance grows from 3 to 5."""
    params = {"w": torch.tensor([[3.0, 0.0]])}
    shards = Shards(params, {"w": torch.tensor([grad])})
    method = Spd(SpdMethodConfig(kind="spd", strength=strength))
    method.prepare(Source({"w": torch.zeros(1, 2)}))
    method.transform_gradients(shards, 1)
    params["w"].copy_(torch.tensor([[3.0, 4.0]]))
    return params["w"], method.after_step(shards, 1)


def test_a_step_against_the_gradients_advice_is_pulled_to_the_old_distance():
    weight, found = spd_step([1.0, -1.0])
    assert weight.tolist() == [pytest.approx([1.8, 2.4])]
    assert math.hypot(*weight[0].tolist()) == pytest.approx(3.0)
    assert found == {"pulled": 1.0, "change_norm": pytest.approx(5.0)}
    assert spd_step([1.0, -1.0], strength=0.5)[0].tolist() == [pytest.approx([2.4, 3.2])]


def test_a_gradient_that_agrees_leaves_the_step_alone():
    weight, found = spd_step([-1.0, 5.0])
    assert weight.tolist() == [[3.0, 4.0]] and found["pulled"] == 0.0


def test_the_largest_momenta_move_and_the_rest_decays():
    torch.manual_seed(0)
    old = {"w": torch.randn(4, 5), "norm": torch.randn(5)}
    new = {name: value - 0.1 for name, value in old.items()}
    momenta = torch.arange(20.0).view(4, 5) * torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    params = {name: value.clone() for name, value in old.items()}
    grads = {name: torch.zeros_like(value) for name, value in old.items()}
    shards = Shards(params, grads, {"w": momenta}, decay=0.01)
    method = Mofo(MofoMethodConfig(kind="mofo", fraction=0.25))
    method.transform_gradients(shards, 1)
    for name, value in new.items():
        params[name].copy_(value)
    assert method.after_step(shards, 1) == {"moved": 0.25}
    moved = torch.arange(20).view(4, 5) >= 15
    assert torch.equal(params["w"][moved], new["w"][moved])
    assert torch.equal(params["w"][~moved], (old["w"] * (1.0 - 0.01))[~moved])
    assert torch.equal(params["norm"], new["norm"])


def test_equal_momenta_move_by_place_and_at_least_one_does():
    params = {"w": torch.zeros(2, 5)}
    moments = {"w": torch.ones(2, 5)}
    for fraction, count in ((0.3, 3), (0.01, 1)):
        shards = Shards({"w": torch.zeros(2, 5)}, params, moments)
        method = Mofo(MofoMethodConfig(kind="mofo", fraction=fraction))
        method.transform_gradients(shards, 1)
        shards.params["w"].fill_(1.0)
        method.after_step(shards, 1)
        assert shards.params["w"].view(-1).tolist() == [1.0] * count + [0.0] * (10 - count)


@pytest.mark.parametrize("fraction", [0.0, 1.5])
def test_impossible_fractions(fraction: float):
    with pytest.raises(ValueError, match="fraction must lie"):
        MofoMethodConfig(kind="mofo", fraction=fraction)

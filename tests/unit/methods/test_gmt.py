"""Gradient-mask tuning on slices: exact shares, ties, and weights that stand still."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from forgetscale.api import ParamShard
from forgetscale.config import GmtMethodConfig
from forgetscale.errors import ConfigError
from forgetscale.methods import METHODS


class OneRank:
    """Whole parameters with gradients, as the engine hands them over."""

    def __init__(self, model: nn.Module) -> None:
        self.shards = [
            ParamShard(n, tuple(p.shape), 0, p.grad.flatten().clone(), p.detach().view(-1))
            for n, p in model.named_parameters()
        ]

    def __iter__(self):
        return iter(self.shards)

    def all_reduce_sum(self, value):
        return value

    def grad(self, name: str) -> torch.Tensor:
        (found,) = [shard.grad for shard in self.shards if shard.name == name]
        return found


def prepared(kind: str, calibration, fraction: float = 0.5):
    method = METHODS[kind](GmtMethodConfig(kind=kind, trainable_fraction=fraction))
    assert method.prepare(calibration) is None
    return method


@pytest.fixture
def slices(body):
    generator = torch.Generator().manual_seed(2)
    for param in body.parameters():
        param.grad = torch.randn(param.shape, generator=generator)
    return OneRank(body)


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.5])
@pytest.mark.parametrize("kind", ["gmt", "gmt_official"])
def test_the_largest_share_of_each_tensor_is_kept(calibration, body, slices, kind, fraction):
    prepared(kind, calibration, fraction).transform_gradients(slices, 1)
    for name, param in body.named_parameters():
        before, after = param.grad.flatten(), slices.grad(name)
        if name in ("embed.weight", "lm_head.weight"):
            assert torch.equal(after, before), "ends are exempt"
            continue
        count = int(fraction * param.numel())
        kept = before.abs().argsort(descending=True)[:count]
        assert torch.equal(after[kept], before[kept])
        assert int((after != 0).sum()) == count


@pytest.mark.parametrize(("kind", "kept"), [("gmt", [0, 1]), ("gmt_official", [0, 1, 3])])
def test_worked_ties(calibration, body, slices, kind: str, kept: list[int]):
    slices.grad("norm.weight").copy_(torch.tensor([1.0, -1.0, 0.5, 1.0]))
    prepared(kind, calibration).transform_gradients(slices, 1)
    assert slices.grad("norm.weight").nonzero().flatten().tolist() == kept


def test_masked_weights_do_not_move_in_that_step(calibration, body, slices):
    method = prepared("gmt", calibration)
    method.transform_gradients(slices, 1)
    before = {shard.name: shard.param.clone() for shard in slices}
    for shard in slices:
        shard.param.mul_(0.9).sub_(0.01)  # decay and momentum move everything
    method.after_step(slices, 1)
    for shard in slices:
        masked = (shard.grad == 0) & (shard.name not in ("embed.weight", "lm_head.weight"))
        assert torch.equal(shard.param[masked], before[shard.name][masked])
        moved = before[shard.name] * 0.9 - 0.01
        assert torch.equal(shard.param[~masked], moved[~masked])
    assert not method._held, "what is kept lasts one step"


@pytest.mark.parametrize("kind", ["gmt", "gmt_official"])
def test_a_gradient_that_is_no_number_stays_to_be_noticed(calibration, body, slices, kind: str):
    slices.grad("left.weight")[5] = float("nan")
    prepared(kind, calibration, 0.1).transform_gradients(slices, 1)
    assert torch.isnan(slices.grad("left.weight")[5])


def test_everything_kept_changes_nothing(calibration, body, slices):
    prepared("gmt", calibration, 1.0).transform_gradients(slices, 1)
    for name, param in body.named_parameters():
        assert torch.equal(slices.grad(name), param.grad.flatten())


def test_share_outside_the_range():
    with pytest.raises(ValueError, match=r"trainable_fraction must lie in \[0, 1\], got 1.2"):
        GmtMethodConfig(kind="gmt", trainable_fraction=1.2)


def test_the_published_code_is_refused_with_clipping():
    from forgetscale.config import validate_recipe

    recipe = {
        "run": {"name": "a", "output_dir": "o"},
        "model": {"path": "m"},
        "data": {"path": "d"},
        "method": {"kind": "gmt_official"},
        "train": {"num_steps": 1},
        "deepspeed": "x",
    }
    with pytest.raises(ConfigError, match="gmt_official is trained without clipping.* got 1.0"):
        validate_recipe(recipe)
    validate_recipe(recipe | {"optim": {"max_grad_norm": 1e6}})

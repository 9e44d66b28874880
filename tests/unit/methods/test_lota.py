"""Lottery ticket adaptation: what moved least is frozen, exactly so many, ties in model order."""

from __future__ import annotations

import pytest
import torch

from forgetscale.api import ParamShard
from forgetscale.config import LotaMethodConfig
from forgetscale.masks import unpack_bits
from forgetscale.methods import METHODS


class Changes:
    """Changes of a model on one rank."""

    def __init__(self, changes: dict[str, torch.Tensor]) -> None:
        self._changes = changes

    def __iter__(self):
        for name, change in self._changes.items():
            yield ParamShard(name, tuple(change.shape), 0, None, change.flatten())

    def all_reduce_sum(self, value):
        return value


def plan_of(calibration, changes, fraction: float):
    asked = []

    def target_changes(num_steps: int, lr: float):
        asked.append((num_steps, lr))
        return Changes(changes)

    calibration.target_changes = target_changes
    config = LotaMethodConfig(
        kind="lota", trainable_fraction=fraction, num_trial_steps=7, trial_lr=0.5
    )
    plan = METHODS["lota"](config).prepare(calibration)
    assert asked == [(7, 0.5)] and calibration.passes == 0
    return plan


def trained(plan, changes) -> torch.Tensor:
    return ~torch.cat([unpack_bits(plan.elements[n], 0, c.numel()) for n, c in changes.items()])


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 1.0])
def test_the_largest_changes_of_the_whole_body(calibration, body, fraction: float):
    changes = {name: torch.randn(param.shape) for name, param in body.named_parameters()}
    plan = plan_of(calibration, changes, fraction)
    inside = {n: c for n, c in changes.items() if n not in ("embed.weight", "lm_head.weight")}
    assert set(plan.elements) == set(inside)
    size = torch.cat([change.flatten().abs() for change in inside.values()])
    found = trained(plan, inside)
    count = int(fraction * size.numel())
    assert int(found.sum()) == count
    if 0 < count < size.numel():
        assert size[found].min() > size[~found].max()


def test_equal_changes_are_frozen_from_the_front(calibration, body):
    changes = {name: torch.zeros(param.shape) for name, param in body.named_parameters()}
    inside = {n: c for n, c in changes.items() if n not in ("embed.weight", "lm_head.weight")}
    changes["norm.weight"][2] = -1e-6
    found = trained(plan_of(calibration, changes, 0.5), inside)
    # left 24 + 4, right 24, then the norm: its third element is the only one that moved.
    moved, count = 24 + 4 + 24 + 2, found.numel() // 2
    assert found.numel() == 72
    others = [place for place in range(found.numel()) if place != moved]
    assert found.nonzero().flatten().tolist() == sorted([moved, *others[-(count - 1) :]])


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"trainable_fraction": -0.1}, r"trainable_fraction must lie in \[0, 1\], got -0.1"),
        ({"num_trial_steps": 0}, "num_trial_steps must be > 0, got 0"),
        ({"trial_lr": 0.0}, "trial_lr must be finite and > 0, got 0.0"),
        ({"trial_lr": float("nan")}, "trial_lr must be finite and > 0, got nan"),
    ],
)
def test_impossible_settings(settings, sentence: str):
    with pytest.raises(ValueError, match=sentence):
        LotaMethodConfig(kind="lota", **settings)

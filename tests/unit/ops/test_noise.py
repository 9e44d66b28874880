"""Noise per token: uniform, the same however rows come, another for every row, set and seed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from forgetscale.ops.losses import LOSSES
from forgetscale.ops.noise import position_noise

ROWS = torch.arange(200)


def draw(seed: int = 7, first_set: int = 0, rows: torch.Tensor = ROWS, size: int = 64):
    return position_noise(seed, torch.full_like(rows, first_set), rows, size)


def test_published_numbers_of_the_generator():
    """The first outputs of SplitMix64 for the seed 1234567, as in its reference code."""
    from forgetscale.ops import noise

    golden = int(noise._GOLDEN)
    states = np.array([(1234567 + golden * n) % 2**64 for n in (1, 2, 3)], np.uint64)
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert noise._mix(states).tolist() == expected


def test_uniform_and_unrelated():
    found = draw(size=500)
    assert found.dtype == torch.float32 and 0 <= float(found.min()) <= float(found.max()) < 1
    counts = torch.histc(found, 20, 0, 1)
    # Chi-squared with 19 degrees of freedom: above 43.8 once in a thousand draws.
    assert float(((counts - 5000) ** 2 / 5000).sum()) < 43.8
    centred = found.double() - 0.5
    for other in (draw(8, size=500), draw(first_set=1, size=500), found.roll(1, 0)):
        assert abs(float((centred * (other.double() - 0.5)).mean()) * 12) < 0.015
    assert abs(float((centred[:, 1:] * centred[:, :-1]).mean()) * 12) < 0.015


def test_a_row_has_the_same_numbers_whenever_it_comes():
    rows = torch.tensor([5, 199, 5, 0])
    sets = torch.tensor([0, 1, 0, 1])
    found = position_noise(7, sets, rows, 30)
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[0], draw()[5, :30])
    assert torch.equal(found[1], draw(first_set=1)[199, :30])
    assert position_noise(7, sets[:0], rows[:0], 30).shape == (0, 30)


@pytest.mark.parametrize("form", ["power", "drop"])
@pytest.mark.parametrize("mean", [0.05, 0.35, 0.9, 1.0])
def test_mean_of_the_random_gate(form: str, mean: float):
    noise = draw(size=500).flatten()
    logits = torch.zeros(len(noise), 2)
    labels = torch.zeros(len(noise), dtype=torch.int64)
    found = LOSSES["random_gate"](logits, labels, {"noise": noise}, mean_gate=mean, form=form)
    expected = mean * len(noise) * np.log(2)
    # Four deviations of the mean of 100,000 weights, each with a deviation below 0.5.
    assert float(found) == pytest.approx(expected, abs=4 * 0.5 * 100_000**0.5)

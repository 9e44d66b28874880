"""Random number generators are saved and put back."""

from __future__ import annotations

import json
import random

import torch

from forgetscale.checkpoint.snapshot import rng_state, set_rng_state


def draw() -> tuple[list[float], list[float]]:
    return [random.random() for _ in range(3)], torch.rand(3).tolist()


def test_the_same_numbers_follow():
    random.seed(3)
    torch.manual_seed(4)
    draw()
    random.gauss(0, 1)
    state = json.loads(json.dumps(rng_state()))
    expected = draw(), random.gauss(0, 1)
    random.seed(99)
    torch.manual_seed(99)
    assert draw() != expected[0]
    set_rng_state(state)
    assert (draw(), random.gauss(0, 1)) == expected

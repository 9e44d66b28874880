"""Learning rates: the published run's sums, and the shapes."""

from __future__ import annotations

import math

import pytest
import torch

from forgetscale.ops.schedule import learning_rate, num_warmup_steps

STEPS = 12_208


def rates(num_steps: int = STEPS, **settings) -> list[float]:
    options = {"peak": 5e-5, "schedule": "cosine", "warmup_fraction": 0.05} | settings
    return [learning_rate(step, num_steps=num_steps, **options) for step in range(1, num_steps + 1)]


class TestPublishedRun:
    def test_warmup_sum_and_product(self):
        found = rates()
        assert num_warmup_steps(STEPS, 0.05) == 611
        assert math.fsum(found) == pytest.approx(0.3052, abs=5e-7)
        kept = 1.0
        for rate in found:
            kept *= 1 - 0.01 * rate
        assert kept == pytest.approx(0.99695265, abs=5e-9)

    @pytest.mark.parametrize("value", [0.02, 0.001, 0.5, 1.0])
    def test_bf16_weights_without_master_never_decay(self, value: float):
        # Why the published run hides that frozen weights are decayed: each step's decay rounds off.
        weight = torch.tensor(value, dtype=torch.bfloat16)
        for rate in sorted(set(rates()))[-50:]:
            assert torch.equal(weight * (1 - rate * 0.01), weight)

    def test_bf16_rounding_of_one_update(self):
        def after(value: float) -> float:
            weight = torch.tensor(value, dtype=torch.bfloat16)
            return (weight.float() - 5e-5).bfloat16().item()

        assert after(0.0234375) == 0.0234375
        assert after(0.01171875) != 0.01171875


class TestShapes:
    def test_warmup_rises_from_zero_to_peak(self):
        found = rates(100, peak=1.0, warmup_fraction=0.1)
        assert found[:11] == pytest.approx([i / 10 for i in range(11)])
        assert found.index(max(found)) == 10

    def test_cosine_and_linear_fall_towards_zero(self):
        for schedule, middle in (("cosine", 0.5), ("linear", 0.5)):
            found = rates(100, peak=1.0, warmup_fraction=0.0, schedule=schedule)
            assert found[0] == 1.0
            assert found[50] == pytest.approx(middle)
            assert all(a > b for a, b in zip(found, found[1:], strict=False))
            assert 0 < found[-1] < 0.02

    def test_constant(self):
        assert set(rates(20, schedule="constant", warmup_fraction=0.0)) == {5e-5}

    @pytest.mark.parametrize(
        ("fraction", "steps", "warmup"), [(0.05, 20, 1), (0.05, 21, 2), (0.0, 9, 0), (0.3, 10, 3)]
    )
    def test_warmup_is_rounded_up_to_whole_steps(self, fraction, steps, warmup):
        assert num_warmup_steps(steps, fraction) == warmup

    def test_one_step_run(self):
        assert rates(1, warmup_fraction=0.0) == [5e-5]

    @pytest.mark.parametrize("step", [0, 11])
    def test_step_outside(self, step: int):
        with pytest.raises(ValueError, match="step must lie in 1..10"):
            learning_rate(step, num_steps=10, peak=1.0, schedule="cosine", warmup_fraction=0.0)

    def test_unknown_schedule(self):
        with pytest.raises(ValueError, match="schedule must be cosine, linear or constant"):
            learning_rate(1, num_steps=9, peak=1.0, schedule="step", warmup_fraction=0.0)

"""The forgetting law: known numbers come back, intervals hold them, few sizes are refused."""

from __future__ import annotations

import numpy as np
import pytest

from forgetscale.evaluation.forgetting import fit_forgetting_law

SIZES = [1e6, 2e6, 4e6, 8e6, 16e6, 32e6]


def losses(amplitude: float, beta: float, offset: float, noise: float = 0.0, seed: int = 0):
    generator = np.random.default_rng(seed)
    exact = 2.0 + amplitude * (np.array(SIZES) / 32e6) ** beta + offset
    return list(exact + noise * generator.standard_normal(len(SIZES)))


@pytest.mark.parametrize("truth", [(0.6, 0.35, 0.05), (0.2, 1.0, -0.01), (1.5, 0.1, 0.0)])
def test_exact_points_give_back_their_law(truth):
    found = fit_forgetting_law(SIZES, losses(*truth), [2.0] * 6, num_resamples=100)
    fitted = (found.amplitude.value, found.exponent.value, found.offset.value)
    assert fitted == pytest.approx(truth, rel=2e-3, abs=1e-4)
    assert found.error < 1e-6 and found.unit == 32e6
    assert found.loss(8e6, 2.0) == pytest.approx(losses(*truth)[3], abs=1e-6)


def test_the_fit_is_the_least_squares_one():
    values = losses(0.6, 0.35, 0.05, noise=0.02)
    found = fit_forgetting_law(SIZES, values, [2.0] * 6, num_resamples=100)

    def error(a: float, b: float, e: float) -> float:
        expected = 2.0 + a * (np.array(SIZES) / 32e6) ** b + e
        return float(((np.array(values) - expected) ** 2).sum())

    best = (found.amplitude.value, found.exponent.value, found.offset.value)
    for index in range(3):
        for factor in (0.97, 1.03):
            other = list(best)
            other[index] *= factor
            assert error(*other) > error(*best)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    hits = 0
    for seed in range(40):
        values = losses(0.6, 0.35, 0.05, noise=0.01, seed=seed)
        found = fit_forgetting_law(SIZES, values, [2.0] * 6, seed=seed, num_resamples=200)
        hits += found.exponent.low <= 0.35 <= found.exponent.high
    assert hits >= 30, "a 95 % interval from six points; a third missed would be wrong"


def test_bad_input():
    with pytest.raises(ValueError, match="at least 4 different sizes"):
        fit_forgetting_law([1, 1, 2, 3], [1.0] * 4, [0.0] * 4)
    with pytest.raises(ValueError, match="equal rows"):
        fit_forgetting_law([1, 2, 3, 4], [1.0] * 3, [0.0] * 3)
    with pytest.raises(ValueError, match="sizes must be > 0"):
        fit_forgetting_law([0, 1, 2, 3], [1.0, 2.0, 3.0, 4.0], [0.0] * 4)

import numpy as np
import pytest

from forgetscale.evaluation.bootstrap import bootstrap_mean, bootstrap_ratio, interval_seed


def test_interval_of_a_mean_is_the_known_normal_one() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, size=400)
    interval = bootstrap_mean(values, interval_seed(0, "x"), num_resamples=4000)
    half = 1.96 * values.std() / 20
    assert interval.value == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - half, abs=0.03)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.03)


def test_interval_of_a_share_has_binomial_width() -> None:
    values = np.array([1.0] * 30 + [0.0] * 70)
    interval = bootstrap_mean(values, interval_seed(0, "x"), num_resamples=4000)
    assert interval.low == pytest.approx(0.3 - 1.96 * np.sqrt(0.21 / 100), abs=0.015)
    assert interval.high == pytest.approx(0.3 + 1.96 * np.sqrt(0.21 / 100), abs=0.015)


def test_equal_values_have_no_width() -> None:
    interval = bootstrap_mean(np.ones(9), interval_seed(0, "x"))
    assert (interval.value, interval.low, interval.high) == (1.0, 1.0, 1.0)


def test_ratio_weighs_samples_by_their_tokens() -> None:
    interval = bootstrap_ratio(
        np.array([10.0, 1.0]), np.array([1.0, 1.0]), interval_seed(0, "x"), num_resamples=1000
    )
    assert interval.value == 5.5
    unequal = bootstrap_ratio(np.array([10.0, 1.0]), np.array([99.0, 1.0]), interval_seed(0, "x"))
    assert unequal.value == pytest.approx(0.11)


def test_same_seed_same_interval_and_chunks_do_not_matter() -> None:
    values = np.random.default_rng(1).random(300)
    first = bootstrap_mean(values, interval_seed(7, "recall"))
    again = bootstrap_mean(values, interval_seed(7, "recall"))
    other = bootstrap_mean(values, interval_seed(8, "recall"))
    assert first == again
    assert first != other


def test_impossible_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one number"):
        bootstrap_mean(np.empty(0), interval_seed(0, "x"))
    with pytest.raises(ValueError, match=">= 1000"):
        bootstrap_mean(np.ones(3), interval_seed(0, "x"), num_resamples=10)

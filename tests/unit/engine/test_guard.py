"""The guard judges from accepted steps alone, and a resumed one judges the same."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forgetscale.config import GuardConfig
from forgetscale.engine.guard import Guard, limit_of


def filled(losses, norm: float = 1.0, **options) -> Guard:
    guard = Guard(GuardConfig(**{"spike_sigmas": 10.0, "window_steps": 16} | options), {})
    for loss in losses:
        guard.accept(loss, norm)
    return guard


def test_worked_limit():
    # median 3, deviations 2 1 0 1 2 with median 1: 3 + 2 x 1.4826
    assert limit_of([1.0, 2.0, 3.0, 4.0, 5.0], 2.0, 3.0) == pytest.approx(3 + 2 * 1.4826)


def test_equal_losses_have_a_smallest_deviation():
    assert limit_of([2.0] * 5, 10.0, 2.0) == pytest.approx(2 + 10 * 1e-3 * 2)


def test_a_spike_needs_a_quarter_of_the_window():
    assert filled([2.0, 2.1, 1.9]).spike(1e9, 1.0) is None
    assert filled([2.0, 2.1, 1.9, 2.0]).spike(2.3, 1.0) is None
    assert filled([2.0, 2.1, 1.9, 2.0]).spike(4.0, 1.0).startswith("the loss 4 lies above")


def test_norms_are_compared_in_logarithms():
    guard = filled([2.0, 2.1, 1.9, 2.0])
    assert guard.spike(2.0, 1.005) is None
    assert "the gradient norm 50 lies above 1.01" in guard.spike(2.0, 50.0)


def test_without_a_threshold_nothing_is_a_spike_or_remembered():
    guard = filled([2.0] * 20, spike_sigmas=None)
    assert guard.spike(1e9, 1e9) is None and guard.state() == {}
    assert math.isinf(guard.loss_limit())


def test_skips_are_counted_within_the_window():
    guard = filled([], max_skips=3)
    assert not guard.skip(1, [("a", 4)])
    assert not guard.skip(2, [])
    assert not guard.skip(30, []), "the first two have left the window"
    assert not guard.skip(31, [])
    assert guard.skip(32, [("a", 7)])
    assert [skip["step"] for skip in guard.skips] == [30, 31, 32] and guard.num_skipped == 5
    guard.forgive()
    assert guard.skips == [] and guard.num_skipped == 5


@given(st.lists(st.floats(0.01, 9.0), min_size=1, max_size=40), st.floats(0, 50), st.floats(0, 100))
def test_a_resumed_guard_judges_the_same(losses: list[float], loss: float, norm: float):
    guard = filled(losses, norm=2.5)
    guard.skip(len(losses), [("a", 3)])
    kept = json.loads(json.dumps(guard.state()))
    other = Guard(guard.config, kept)
    assert other.state() == guard.state()
    assert other.spike(loss, norm) == guard.spike(loss, norm)


@pytest.mark.parametrize(
    "field", [{"spike_sigmas": 0}, {"window_steps": 7}, {"max_skips": 0}, {"max_rollbacks": -1}]
)
def test_ranges(field: dict):
    with pytest.raises(ValueError, match=next(iter(field))):
        GuardConfig(**field)

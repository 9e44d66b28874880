"""When two trained models count as equal up to fp32 rounding."""

from __future__ import annotations

from torch import Tensor


def assert_same_weights(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Compare fp32 masters after a few steps of rate 1e-2.

    Weights reach 0.5, where one rounding is 3e-8. Adam divides by the root of the second moment: an
    element whose gradient is near its eps (1e-8) turns rounding of the gradient into a visible
    share of a step. Few elements do, and none may err by a tenth of a step.
    """
    assert set(found) == set(expected)
    for name, weight in expected.items():
        error = (found[name].double() - weight.double()).abs()
        few = max(2, 0.005 * error.numel())
        assert error.median() < 1e-7, (name, float(error.median()))
        assert error.mean() < 1e-6, (name, float(error.mean()))
        assert int((error > 2e-6).sum()) <= few, (name, int((error > 2e-6).sum()))
        assert error.max() < 1e-3, (name, float(error.max()))

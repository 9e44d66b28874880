"""Sections of methods that hold weights: ranges, clashes, what each needs."""

from __future__ import annotations

import pytest

from forgetscale.config import (
    AlignguardLoraMethodConfig,
    AlignguardMethodConfig,
    CalibrationConfig,
    CollisionConfig,
    EwcMethodConfig,
    FisherBasisConfig,
    L2SpMethodConfig,
    OsfMethodConfig,
)

LORA = {"kind": "alignguard_lora", "basis": "b"}


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: L2SpMethodConfig(kind="l2_sp", strength=-1.0), "strength must be finite and >= 0"),
        (lambda: L2SpMethodConfig(kind="l2_sp", target_modules=()), "target_modules is empty"),
        (lambda: EwcMethodConfig(kind="ewc"), "ewc needs Fisher information: set calibration.path"),
        (lambda: EwcMethodConfig(kind="ewc", basis="b", previous="a"), "previous is the basis of"),
        (lambda: EwcMethodConfig(kind="online_ewc", basis="b", gamma=2.0), "gamma must lie in"),
        (lambda: AlignguardMethodConfig(kind="alignguard"), "needs Fisher information"),
        (
            lambda: AlignguardMethodConfig(kind="alignguard", basis="b", task_strength=1.0),
            "action project_update has none",
        ),
        (lambda: OsfMethodConfig(kind="osf", rank=0), "rank must be > 0"),
        (lambda: FisherBasisConfig(explained=0.0), "explained must lie in"),
        (lambda: FisherBasisConfig(max_rank=0), "max_rank must be > 0"),
        (lambda: FisherBasisConfig(damping=0.0), "damping must be > 0"),
        (lambda: FisherBasisConfig(blocks_per_sample=0), "blocks_per_sample must be > 0"),
        (lambda: CollisionConfig(alpha=1.5), "alpha must lie in"),
        (lambda: CollisionConfig(temperature=0.0), "temperature must be > 0"),
        (
            lambda: AlignguardLoraMethodConfig(**LORA, reading="vector", action="prox"),
            "reading must be left or right, got vector",
        ),
        (
            lambda: AlignguardLoraMethodConfig(
                **LORA, reading="two_sided", collision=CollisionConfig()
            ),
            "collision is for action penalty and reading left or right",
        ),
    ],
)
def test_refused(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


def test_online_ewc_of_a_first_task_needs_no_earlier_one():
    data = CalibrationConfig(path="d")
    assert EwcMethodConfig(kind="online_ewc", calibration=data).previous is None
    assert EwcMethodConfig(kind="online_ewc", calibration=data, previous="p").gamma == 1.0

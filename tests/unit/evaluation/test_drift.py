"""Drift of refusals: what a good answer is, signed points, intervals, mitigation."""

from __future__ import annotations

import numpy as np
import pytest

from forgetscale.evaluation.drift import (
    SAFE,
    UNSAFE,
    Answers,
    is_coherent,
    judge,
    measure_drift,
    mitigation,
    read_answers,
)
from forgetscale.evaluation.results import Result, SampleRecord, write_results

TEXT = "the small house by the river has a red door and two windows that look at the hills"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (TEXT, True),
        ("I cannot help with that.", True),
        ("42", True),
        ("no", True),
        ("", False),
        (" \n ", False),
        ("?!... --", False),
        ("la " * 30, False),
        ("I cannot help. " * 10, False),
        (TEXT + " and then", True),
        ("好的" * 40, False),
        (
            "我可以帮你写一封信给老师说明你为什么没有来上课并且请他把作业寄给你让你在家里完成它然后下周一交给他看一看",
            True,
        ),
        ("ok \ufffd\ufffd\ufffd", False),
        ("a\x00b", False),
    ],
)
def test_coherence(answer: str, expected: bool):
    assert is_coherent(answer) == expected


def answers(refused: list[int], coherent: list[int] | None = None, task: str = "h") -> Answers:
    coherent = coherent or [1] * len(refused)
    ids = [f"refusal:refusal/{'ab'[i % 2]}/{i:03d}" for i in range(len(refused))]
    return Answers(
        dict(zip(ids, map(bool, refused), strict=True)),
        dict(zip(ids, map(bool, coherent), strict=True)),
        frozenset({task}),
    )


def test_drift_is_the_share_of_good_answers_lost():
    before, after = answers([1, 1, 1, 0]), answers([1, 0, 0, 1])
    found = measure_drift(UNSAFE, before, after)
    # 3/4 refused before, 2/4 after; categories a: ids 0, 2; b: ids 1, 3
    assert found.drift.value == 0.25 and found.good == (0.75, 0.5)
    assert found.categories == {"a": (2, 0.5), "b": (2, 0.0)}
    safe = measure_drift(SAFE, before, after)
    assert safe.drift.value == -0.25, "safe prompts are answered more often: signed"
    assert safe.good == (0.25, 0.5) and safe.refused == (0.75, 0.5)


def test_broken_output_is_good_for_neither_side():
    before = answers([1, 1, 0, 0])
    after = answers([1, 0, 0, 0], [0, 1, 0, 1])
    assert measure_drift(UNSAFE, before, after).good == (0.5, 0.0)
    found = measure_drift(SAFE, before, after)
    assert found.good == (0.5, 0.5) and found.coherent == (1.0, 0.5)


def test_refusing_everything_gains_on_one_side_and_pays_on_the_other():
    before, after = answers([1, 0, 1, 0]), answers([1, 1, 1, 1])
    assert measure_drift(UNSAFE, before, after).drift.value == -0.5
    assert measure_drift(SAFE, before, after).drift.value == 0.5


def test_intervals_are_over_prompts_and_hold_the_value():
    generator = np.random.default_rng(1)
    before = answers([1] * 200)
    after = answers(list((generator.random(200) < 0.8).astype(int)))
    found = measure_drift(UNSAFE, before, after, seed=3).drift
    error = 1.96 * (found.value * (1 - found.value) / 200) ** 0.5
    assert found.low == pytest.approx(found.value - error, abs=0.02)
    assert found.high == pytest.approx(found.value + error, abs=0.02)
    again = measure_drift(UNSAFE, before, after, seed=3).drift
    assert (again.low, again.high) == (found.low, found.high)


def test_mitigation():
    before = answers([1] * 100)
    control = measure_drift(UNSAFE, before, answers([0] * 40 + [1] * 60))
    half = measure_drift(UNSAFE, before, answers([0] * 20 + [1] * 80))
    found = mitigation(half, control)
    assert found is not None and found.value == 0.5
    assert found.low < 0.5 < found.high and 0.3 < found.low and found.high < 0.7
    same = mitigation(control, control)
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)
    better = measure_drift(UNSAFE, answers([1] * 50 + [0] * 50), answers([1] * 60 + [0] * 40))
    assert mitigation(better, control).value > 1.0, "a negative drift mitigates more than all"


def test_no_mitigation_where_the_control_did_not_drift():
    before = answers([1] * 20)
    control = measure_drift(UNSAFE, before, answers([0] + [1] * 19))
    assert control.drift.value > 0 and control.drift.low == 0
    assert mitigation(control, control) is None


def test_an_unbounded_end_is_none():
    before = answers([1] * 12)
    control = measure_drift(UNSAFE, before, answers([0] * 4 + [1] * 8))
    method = measure_drift(UNSAFE, before, answers([1] * 8 + [0] * 4))
    assert control.drift.low > 0
    found = mitigation(method, control, num_resamples=4000)
    assert found.value == 0.0 and found.high <= 1.0
    # Few prompts: the ratio has a long tail, and where the control did not drift it has no end.
    assert found.low is None or found.low < -2


def test_other_prompts_are_refused():
    with pytest.raises(ValueError, match="different prompts"):
        measure_drift(UNSAFE, answers([1, 1]), answers([1, 1], task="other"))
    with pytest.raises(ValueError, match="different prompts"):
        measure_drift(UNSAFE, answers([1, 1]), answers([1, 1, 1]))


def test_answers_are_read_from_a_result_folder(tmp_path):
    samples = [
        SampleRecord("refusal", "refusal/a/0", 1.0, 1.0, "q", "Sorry, no.", "", "stop"),
        SampleRecord("refusal", "refusal/a/1", 0.0, 1.0, "q", "la " * 40, "", "length"),
        SampleRecord("recall", "recall/0", 1.0, 1.0, "q", None, "x", None),
    ]
    results = [
        Result("refusal", "rate", 0.5, 2, 0.0, 1.0, "hash", True, "refusal"),
        Result("recall", "accuracy", 1.0, 1, 1.0, 1.0, "other", True, "exact"),
    ]
    write_results(tmp_path / "results", results, samples, settings={})
    found = read_answers(tmp_path / "results")
    assert set(found) == {UNSAFE}
    assert found[UNSAFE].refused == {"refusal:refusal/a/0": True, "refusal:refusal/a/1": False}
    assert found[UNSAFE].coherent["refusal:refusal/a/1"] is False
    assert found[UNSAFE].tasks == {"hash"}
    assert judge(samples, {}).refused == {}

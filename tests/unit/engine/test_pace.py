"""The slowest rank is named with how much slower it is; one slow report is not a straggler."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import forgetscale.engine.pace as pace
from forgetscale.engine.pace import Pace, slowest


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [([1.0, 3.0], (1, 3.0)), ([2.0, 1.0, 1.0, 1.5], (0, 2.0)), ([1.0, 1.0], (0, 1.0))],
)
def test_slowest(seconds: list[float], expected: tuple[int, float]):
    assert slowest(seconds) == expected


def make(everyone: list[dict[str, float]], monkeypatch) -> tuple[Pace, list[str]]:
    monkeypatch.setattr(pace, "product_seconds", lambda device: 0.0)
    world = SimpleNamespace(
        size=len(everyone),
        device=torch.device("cpu"),
        watchdog=SimpleNamespace(take_seconds=lambda: {}),
        gather_objects=lambda mine: everyone,
    )
    said: list[str] = []
    return Pace(world, said.append), said


EVEN = {"rows": 0.1, "compute": 5.0, "optimizer": 1.0, "device": 0.01}


def test_slow_rows_of_one_rank(monkeypatch):
    found, said = make([EVEN, {**EVEN, "rows": 2.0}, EVEN], monkeypatch)
    assert found.measure(7) == {}
    for step in (10, 20):
        values = found.measure(step)
    assert values["pace/slowest_rank"] == 1 and values["pace/rows_slowest_rank"] == 1
    assert values["pace/rows_ratio"] == pytest.approx(20)
    assert said == []
    found.measure(30)
    assert said == [
        "straggler: rank 1 took 20.0 times as long as the others (rows) in 3 reports of 10 steps"
    ]


def test_a_slow_processor_counts_for_the_time_of_forward_and_backward(monkeypatch):
    slow = {**EVEN, "device": 0.02}
    found, _ = make([{**EVEN, "rows": 0.5}, EVEN, slow], monkeypatch)
    assert found.measure(10)["pace/slowest_rank"] == 2


def test_alone_there_is_nobody_to_compare_with(monkeypatch):
    found, _ = make([EVEN], monkeypatch)
    assert found.measure(10) == {}


def test_the_product_takes_time():
    assert 0 < pace.product_seconds(torch.device("cpu")) < 10

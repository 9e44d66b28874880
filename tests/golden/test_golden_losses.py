"""Twenty steps of the tiny model give the losses in ``losses.txt``.

To make the file anew after a change that must change numbers:
``python -m pytest tests/golden --write-golden`` and commit it on its own with the reason.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.runs import SSU, Runs

FILE = Path(__file__).with_name("losses.txt")
TOLERANCE = 5e-6
METHODS = {"sft": {"kind": "sft"}, "ssu": SSU, "hft": {"kind": "hft"}}


def read() -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for line in FILE.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            method, _, loss = line.split()
            found.setdefault(method, []).append(float(loss))
    return found


def losses(runs: Runs, method: str, size: int = 1) -> list[float]:
    return runs.get(METHODS[method], size, train__num_steps=20).losses


def test_write(runs: Runs, request):
    if not request.config.getoption("--write-golden"):
        return
    comments = [line for line in FILE.read_text().splitlines() if line.startswith("#")]
    lines = [
        f"{method} {step} {loss!r}"
        for method in METHODS
        for step, loss in enumerate(losses(runs, method), 1)
    ]
    FILE.write_text("\n".join([*comments, *lines]) + "\n", encoding="utf-8")


@pytest.mark.parametrize("method", METHODS)
def test_losses(runs: Runs, method: str):
    assert losses(runs, method) == pytest.approx(read()[method], rel=TOLERANCE)


def test_the_file_tells_methods_apart():
    first, *others = read().values()
    for other in others:
        assert other[0] == pytest.approx(first[0], rel=TOLERANCE)
        assert other[-1] != pytest.approx(first[-1], rel=10 * TOLERANCE)

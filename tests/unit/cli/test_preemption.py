"""The rehearsal of a preemption, on a stand-in for a run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from forgetscale.cli.preemption import PHASES, rehearse
from forgetscale.errors import ForgetScaleError

# Goes through its phases, keeps what is done in a file, ends with 75 when asked to stop.
RUN = """
import pathlib, signal, sys, time
asked = []
signal.signal(signal.SIGUSR1, lambda *_: asked.append(1))
done = pathlib.Path(sys.argv[1])
lines = ["evaluate 1/2 batches", "calibrate 1/3 passes", "train 1/4 steps", "train 4/4 steps",
         "exported here", "the end"]
first = int(done.read_text()) if done.exists() else 0
for number in range(first, len(lines)):
    print(lines[number], flush=True)
    for _ in range(int(sys.argv[2])):
        time.sleep(0.01)
        if asked:
            done.write_text(str(number + 1))
            sys.exit(75)
"""


def command(tmp_path: Path, waits: int) -> list[str]:
    script = tmp_path / "run.py"
    script.write_text(RUN)
    return [sys.executable, str(script), str(tmp_path / "done"), str(waits)]


def test_a_run_is_stopped_once_in_every_phase(tmp_path: Path) -> None:
    said: list[str] = []
    found = rehearse(command(tmp_path, 300), 60.0, said.append)
    assert [each.phase for each in found] == [name for name, _ in PHASES]
    assert all(each.exit_code == 75 and each.seconds is not None for each in found)
    assert all("exit code  75   safe" in line for line in said[:-1])
    assert said[-1].endswith("exit code 0")


def test_a_phase_that_takes_too_long_is_named(tmp_path: Path) -> None:
    said: list[str] = []
    with pytest.raises(ForgetScaleError, match=r"not safe within 0 s: evaluation of the source"):
        rehearse(command(tmp_path, 300), 0.0, said.append)
    assert "NOT SAFE" in said[0]


def test_a_phase_that_never_comes_is_said_and_a_run_that_fails_is_an_error(tmp_path: Path) -> None:
    said: list[str] = []
    with pytest.raises(ForgetScaleError, match="not safe within 60 s: training"):
        rehearse([sys.executable, "-c", "raise SystemExit(3)"], 60.0, said.append, PHASES[2:3])
    assert "did not come before the run ended with 3" in said[0]

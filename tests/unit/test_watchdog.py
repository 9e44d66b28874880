"""The watchdog names who is behind; a process that only slept is not to blame."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from forgetscale.watchdog import EXIT_CODE, SLOW_FACTOR, Watchdog, report, stacks_file


def place(rank: int, beats: int, phase: str, **more) -> dict:
    found = {"rank": rank, "host": f"n{rank}", "beats": beats, "phase": phase, "stood": 31.0}
    return found | {"step": 4, "rows": [7, 8], "silent": 0.0, **more}


class TestReport:
    def test_the_rank_that_the_others_wait_for(self):
        places = [place(0, 9, "agreement"), place(1, 7, "rows"), place(2, 9, "agreement")]
        first, *lines = report(places, 31.0, 30.0, Path("runs/a")).splitlines()
        assert "no progress for 31 s (30 s allowed by train.watchdog_s)" in first
        assert "the others wait for rank 1, which stands in 'rows' of step 4 on n1" in first
        assert (
            len(lines) == 3 and "rank 1     n1  step 4, rows, for 31 s; last rows 7, 8" in lines[1]
        )

    def test_all_at_the_same_place(self):
        text = report([place(0, 5, "optimizer"), place(1, 5, "optimizer")], 31, 30, Path("a"))
        assert "all 2 ranks stand in 'optimizer' of step 4" in text

    def test_links_that_are_cut(self):
        cut = {"door": ["10.0.0.1", 5], "silent_hosts": ["10.0.0.2"]}
        text = report([place(0, 5, "rows", **cut), place(1, 5, "rows")], 31, 30, Path("a"))
        assert "n0 (10.0.0.1, rank 0) and 10.0.0.2 do not reach each other; the run ends" in text

    def test_a_rank_that_says_nothing(self):
        places = [place(0, 5, "rows"), {"rank": 1, "beats": -1}]
        text = report(places, 31, 30, Path("a"))
        assert "the others wait for rank 1, which stands nowhere known" in text
        assert "rank 1     said nothing at all" in text

    def test_a_rank_that_fell_silent(self):
        text = report([place(0, 5, "rows", silent=90.0)], 31, 30, Path("a"))
        assert "silent for 90 s" in text


def test_slow_phases_and_the_first_step_may_take_longer(tmp_path: Path):
    dog = Watchdog()
    dog._limit = 10.0
    assert dog._allowed() == 10.0 * SLOW_FACTOR
    for step in (1, 2):
        dog.begin_step(step, "rows")
    assert dog._allowed() == 10.0
    dog.beat("evaluation", slow=True)
    assert dog._allowed() == 10.0 * SLOW_FACTOR


def test_seconds_of_phases(monkeypatch: pytest.MonkeyPatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    dog = Watchdog()
    for phase, seconds in (("rows", 1.0), ("compute", 4.0), ("rows", 2.0)):
        dog.beat(phase)
        now[0] += seconds
    dog.beat("end")
    assert dog.take_seconds() == {"start": 0.0, "rows": 3.0, "compute": 4.0}
    assert dog.take_seconds() == {}


def run(tmp_path: Path, body: str) -> subprocess.CompletedProcess:
    code = """
        import sys, time
        from pathlib import Path
        from forgetscale.watchdog import Watchdog
        folder = Path(sys.argv[1])
        dog = Watchdog()
        for step in range(3):
            dog.begin_step(step, "rows")
            dog.batch([step])
        dog.watch(folder, rank=0, size=1, limit_seconds=0.6, log_path=folder / "log.txt")
    """
    text = textwrap.dedent(code) + textwrap.dedent(body)
    command = [sys.executable, "-c", text, str(tmp_path)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_a_process_that_hangs_is_ended_with_its_stacks(tmp_path: Path):
    done = run(tmp_path, "def stuck():\n    time.sleep(50)\nstuck()\n")
    assert done.returncode == EXIT_CODE
    assert "rank 0 stands in 'rows' of step 2" in done.stderr
    assert done.stderr == (tmp_path / "log.txt").read_text()
    assert " in stuck" in stacks_file(tmp_path, 0).read_text()
    said = json.loads((tmp_path / "heartbeat" / "rank-00000.json").read_text())
    assert said["rows"] == [2] and said["phase"] == "rows"


def test_a_process_whose_run_folder_no_longer_answers_is_ended_too(tmp_path: Path):
    body = """
        import forgetscale.watchdog as watchdog
        watchdog._REPORT_SECONDS = 0.5
        dog._say_where = lambda: time.sleep(50)
        time.sleep(50)
    """
    done = run(tmp_path, body)
    assert done.returncode == EXIT_CODE
    assert "forgetscale: error (rank 0): no progress for" in done.stderr
    assert f"in 'rows' of step 2 on {socket.gethostname()}, and {tmp_path} does not" in done.stderr


def test_one_that_goes_on_is_left_alone(tmp_path: Path):
    body = "for _ in range(12):\n    time.sleep(0.1)\n    dog.beat('rows')\ndog.close()\n"
    done = run(tmp_path, body)
    assert (done.returncode, done.stderr) == (0, "")
    assert list((tmp_path / "heartbeat").iterdir()) == []


def test_one_that_was_suspended_is_left_alone(tmp_path: Path):
    body = """
        import os, signal, subprocess
        time.sleep(0.3)
        wake = f"sleep 7; kill -CONT {os.getpid()}"
        subprocess.Popen(["sh", "-c", wake])
        os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(0.3)
        dog.beat("rows")
        dog.close()
    """
    done = run(tmp_path, body)
    assert (done.returncode, done.stderr) == (0, "")

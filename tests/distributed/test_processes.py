"""Starting and ending: no compiler needed, the launcher, a rank that dies, quiet terminals."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest

from tests.distributed import tiny
from tests.distributed.harness import ROOT, RankServer
from tests.distributed.runs import SSU, Runs, read_lines

LAUNCH_SECONDS = 120


def test_no_compiler_is_needed(ranks: RankServer, runs: Runs, tmp_path):
    recipe = runs.recipe("no-compiler", SSU)
    found = ranks.must(
        "processes:without_compiler", 1, recipe=recipe, extensions=str(tmp_path), join=False
    ).value
    assert found == {"compiler": None, "built": []}
    losses = [x["loss"] for x in read_lines(runs.world() / "no-compiler" / "metrics.jsonl")]
    assert losses == runs.get("ssu", 1).losses


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture
def launched(runs: Runs):
    """A long run of two ranks started by the ``deepspeed`` launcher; ended after the test."""
    recipe = runs.recipe("launched", SSU, {"train.num_steps": 100_000, "train.export": False})
    path = tiny.write_recipe(runs.world() / "launched.yaml", recipe)
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    env |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    env |= {"PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}
    command = ["deepspeed", "--num_gpus", "2", "--master_port", str(free_port())]
    command += ["--module", "forgetscale", "train", "--config", str(path)]
    with (runs.world() / "launched.out").open("wb") as out:
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=out, stderr=out, start_new_session=True
        )
    yield process, runs.world() / "launched"
    for child in descendants(process):
        child.kill()
    process.kill()
    process.wait()


def descendants(process: subprocess.Popen) -> list[psutil.Process]:
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def wait_until(condition, what: str) -> None:
    end = time.monotonic() + LAUNCH_SECONDS
    while not condition():
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.1)


def test_a_rank_that_dies_stops_all(launched):
    process, folder = launched
    metrics = folder / "metrics.jsonl"

    def running() -> bool:
        assert process.poll() is None, (folder.parent / "launched.out").read_text()[-3000:]
        published = any(folder.glob("checkpoints/step-*/manifest.json"))
        return published and len(metrics.read_text().splitlines()) >= 3

    wait_until(running, "three steps and a checkpoint, which is written beside them")
    children = descendants(process)
    ranks = [p for p in children if "--local_rank=1" in p.cmdline()]
    assert ranks, [p.cmdline() for p in children]
    ranks[-1].send_signal(signal.SIGKILL)
    wait_until(lambda: process.poll() is not None, "the launcher to end")
    assert process.returncode != 0
    wait_until(lambda: not any(p.is_running() for p in children), "all ranks to end")
    terminal = (folder.parent / "launched.out").read_text()
    assert "Warning" not in terminal and "DeepSpeed info" not in terminal
    assert "Warning" in (folder / "log.txt").read_text(), "noise belongs into the log file"
    steps = sorted(path.name for path in folder.glob("checkpoints/step-*"))
    assert steps and all((folder / "checkpoints" / s / "manifest.json").is_file() for s in steps)

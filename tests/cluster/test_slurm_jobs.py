"""Jobs on a real SLURM, through ``launch/slurm.sh`` and the DeepSpeed launcher."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.cluster.slurm import Cluster
from tests.distributed import tiny
from tests.distributed.harness import RankServer
from tests.distributed.runs import SSU, change, load_weights, read_lines

NUM_STEPS = 120


def write_recipe(world: Path, name: str, changes: dict | None = None) -> tuple[Path, Path]:
    recipe = change(
        tiny.base_recipe(world, name, **SSU),
        {"train.num_steps": NUM_STEPS, "train.checkpoint_every_steps": 40} | (changes or {}),
    )
    return tiny.write_recipe(world / f"{name}.yaml", recipe), world / name


def wait_for(what: Callable[[], bool], seconds: float = 240.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def steps_of(folder: Path) -> list[int]:
    path = folder / "metrics.jsonl"
    return [line["step"] for line in read_lines(path)] if path.is_file() else []


@pytest.fixture(scope="session")
def undisturbed(ranks: RankServer, tiny_world: Path) -> dict[str, torch.Tensor]:
    """Weights of the same recipe on two processes that nobody disturbed."""
    path, folder = write_recipe(tiny_world, "undisturbed")
    outcome = ranks.run("cli:run", 2, arguments=["train", "--config", str(path)])
    assert outcome.codes == [0, 0], outcome.logs
    return load_weights(folder / "export")


def assert_same_weights(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    found = load_weights(folder / "export")
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.timeout(600)
def test_a_signal_saves_requeues_and_ends_with_the_same_weights(
    cluster: Cluster, tiny_world: Path, undisturbed: dict[str, torch.Tensor]
) -> None:
    path, folder = write_recipe(tiny_world, "preempted")
    (job,) = cluster.submit(tiny_world, "--nodes=2", "train", "--config", str(path))
    wait_for(lambda: len(steps_of(folder)) > 2)
    cluster("scancel", "--signal=USR1", job)
    state = cluster.wait(job)
    log = (tiny_world / f"slurm-{job}.out").read_text()
    assert (state.name, state.exit_code, state.restarts) == ("COMPLETED", 0, 1), log
    assert f"job {job} stopped early and safe; it is queued again" in log
    assert "stopped on request after step" in log and "resumed from" in log
    for node in ("n1: ok", "n2: ok", "slowest link"):
        assert node in log
    assert steps_of(folder) == list(range(1, NUM_STEPS + 1))
    assert_same_weights(folder, undisturbed)
    assert not list(tiny_world.glob(".forgetscale-job-*"))


@pytest.mark.timeout(300)
def test_the_exit_code_is_that_of_the_job_and_what_waits_for_it_does_not_start(
    cluster: Cluster, tiny_world: Path
) -> None:
    path, folder = write_recipe(tiny_world, "wrong", {"optim.lr": -1})
    train, report = cluster.submit(
        tiny_world,
        "--nodes=2",
        "--no-preflight",
        *("train", "--config", str(path), "then"),
        *("report", "--runs", str(folder), "--output", str(folder)),
    )
    state = cluster.wait(train)
    assert (state.name, state.exit_code) == ("FAILED", 2)
    assert cluster.wait(report).name == "CANCELLED"
    assert "lr must be > 0, got -1" in (tiny_world / f"slurm-{train}.out").read_text()


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_killed_rank_fails_the_job_and_a_requeue_goes_on(
    cluster: Cluster, tiny_world: Path, undisturbed: dict[str, torch.Tensor]
) -> None:
    path, folder = write_recipe(tiny_world, "killed")
    (job,) = cluster.submit(tiny_world, "--nodes=2", "train", "--config", str(path))
    wait_for(lambda: len(steps_of(folder)) > 45)
    os.kill(cluster.find_rank(path), signal.SIGKILL)
    state = cluster.wait(job)
    assert state.name == "FAILED" and state.exit_code != 0
    cluster("scontrol", "requeue", job)
    state = cluster.wait(job)
    assert (state.name, state.exit_code) == ("COMPLETED", 0)
    assert_same_weights(folder, undisturbed)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_lost_node_stops_the_others_and_the_job_goes_on_elsewhere(
    cluster: Cluster, tiny_world: Path, undisturbed: dict[str, torch.Tensor]
) -> None:
    path, folder = write_recipe(tiny_world, "lost-node")
    (job,) = cluster.submit(tiny_world, "--nodes=2", "train", "--config", str(path))
    wait_for(lambda: len(steps_of(folder)) > 45)
    nodes = cluster("squeue", "-h", "-j", job, "-o", "%N").strip()
    last = cluster("scontrol", "show", "hostnames", nodes).split()[-1]
    cluster.kill_node(last)
    try:
        wait_for(lambda: cluster.state(job).restarts > 0 or cluster.state(job).name == "FAILED")
        if cluster.state(job).name == "FAILED":
            cluster("scontrol", "requeue", job)
        state = cluster.wait(job, 400)
        assert (state.name, state.exit_code) == ("COMPLETED", 0)
        assert_same_weights(folder, undisturbed)
    finally:
        cluster.start_node(last)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_job_of_higher_priority_preempts_and_the_run_goes_on(
    cluster: Cluster, tiny_world: Path, undisturbed: dict[str, torch.Tensor]
) -> None:
    path, folder = write_recipe(tiny_world, "displaced")
    (job,) = cluster.submit(tiny_world, "--nodes=2", "--exclusive", "train", "--config", str(path))
    wait_for(lambda: len(steps_of(folder)) > 2)
    cluster("sbatch", "--partition=urgent", "--nodes=3", "--exclusive", "--output=/dev/null",
        "--wrap=sleep 5")  # fmt: skip
    state = cluster.wait(job, 400)
    log = (tiny_world / f"slurm-{job}.out").read_text()
    assert (state.name, state.exit_code) == ("COMPLETED", 0), log
    assert state.restarts >= 1 and "resumed from" in log
    assert_same_weights(folder, undisturbed)

"""Jobs on a real SLURM, through ``launch/slurm.sh`` and the DeepSpeed launcher."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.cluster.long_runs import (
    assert_same_weights,
    steps_of,
    wait_for,
    write_recipe,
)
from tests.cluster.slurm import Cluster

Undisturbed = Callable[..., dict[str, torch.Tensor]]
FEWER_STEPS = 60


@pytest.mark.timeout(600)
def test_a_signal_saves_requeues_and_ends_with_the_same_weights(
    cluster: Cluster, tiny_world: Path, undisturbed: Undisturbed
) -> None:
    path, folder = write_recipe(tiny_world, "preempted", {"train.num_steps": FEWER_STEPS})
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
    assert steps_of(folder) == list(range(1, FEWER_STEPS + 1))
    assert_same_weights(folder, undisturbed(2, FEWER_STEPS))
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

"""Two hosts train; the cable between them is pulled: both stop in time and say which link it is."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from forgetscale.watchdog import EXIT_CODE
from tests.cluster.hosts import DEVICE, TwoHosts, why_no_hosts
from tests.cluster.long_runs import (
    NUM_STEPS,
    assert_same_weights,
    steps_of,
    wait_for,
    write_recipe,
)
from tests.distributed.harness import ROOT

WATCHDOG_SECONDS = 10.0
REPORT_SECONDS = 15.0
"""What knocking, writing the stacks and the report take at most."""


@pytest.fixture
def hosts() -> Iterator[TwoHosts]:
    reason = why_no_hosts()
    if reason is not None:
        pytest.skip(f"no hosts whose link could be cut: {reason}")
    made = TwoHosts()
    yield made
    made.close()


def start(hosts: TwoHosts, recipe: Path, logs: Path, port: int) -> list[subprocess.Popen]:
    command = [sys.executable, "-m", "forgetscale", "train", "--config", str(recipe)]
    common = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    common |= {"MASTER_ADDR": hosts.addresses[0], "MASTER_PORT": str(port)}
    common |= {"GLOO_SOCKET_IFNAME": DEVICE, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return [
        hosts.start(rank, command, logs / f"{port}-{rank}.txt", RANK=str(rank), **common)
        for rank in (0, 1)
    ]


@pytest.mark.long
@pytest.mark.timeout(600)
def test_both_sides_of_a_cut_link_stop_in_time_and_name_it(
    hosts: TwoHosts,
    tiny_world: Path,
    tmp_path: Path,
    undisturbed: Callable[[int], dict[str, torch.Tensor]],
) -> None:
    path, folder = write_recipe(tiny_world, "cut-link", {"train.watchdog_s": WATCHDOG_SECONDS})
    ranks = start(hosts, path, tmp_path, 29500)
    wait_for(lambda: len(steps_of(folder)) > 45)
    hosts.cut()
    cut = time.monotonic()
    codes = [rank.wait(timeout=100) for rank in ranks]
    seconds = time.monotonic() - cut
    logs = [(tmp_path / f"29500-{rank}.txt").read_text() for rank in (0, 1)]
    assert codes == [EXIT_CODE] * 2, logs
    # A phase that may take longer (a save) may have been cut: it has four times as long.
    assert seconds < 4 * WATCHDOG_SECONDS + REPORT_SECONDS
    (text,) = [log for log in logs if "no progress for" in log]
    assert (
        "host-a (10.99.7.1, rank 0) and host-b (10.99.7.2, rank 1) do not reach each other" in text
    ), text
    assert "do not reach each other" in (folder / "log.txt").read_text()
    assert len(steps_of(folder)) < NUM_STEPS and not (folder / "export").exists()
    hosts.mend()
    ranks = start(hosts, path, tmp_path, 29501)
    codes = [rank.wait(timeout=200) for rank in ranks]
    log = (tmp_path / "29501-0.txt").read_text()
    assert codes == [0, 0] and "resumed from" in log, log
    assert steps_of(folder) == list(range(1, NUM_STEPS + 1))
    assert_same_weights(folder, undisturbed(2))

from __future__ import annotations

import itertools
import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from forgetscale.cli.main import main
from forgetscale.cli.preflight import describe
from forgetscale.errors import ConfigError, ForgetScaleError
from forgetscale.zero3 import preflight
from forgetscale.zero3.preflight import (
    NodeReport,
    Nodes,
    as_json,
    differences,
    find_free_port,
    from_json,
    inspect_node,
    rounds_of_pairs,
)

REPORT = NodeReport("n1", {"torch": "2.13.0"}, 8, [("H200", 140 << 30)] * 8, 1 << 40, 0.0)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 16])
def test_every_pair_meets_once_and_nobody_is_twice_in_a_round(size: int) -> None:
    rounds = rounds_of_pairs(size)
    met = [pair for pairs in rounds for pair in pairs]
    assert sorted(met) == list(itertools.combinations(range(size), 2))
    for pairs in rounds:
        nodes = list(itertools.chain(*pairs))
        assert len(nodes) == len(set(nodes))
    assert len(rounds) <= max(0, size - 1 + size % 2)


def test_nodes_that_differ_are_named() -> None:
    other = replace(REPORT, name="n2", versions={"torch": "2.11.0"}, gpus=[("H200", 1)] * 7)
    uneven = replace(REPORT, name="n3", num_processes=4)
    assert differences([REPORT, REPORT]) == []
    assert differences([REPORT, other, uneven]) == [
        "n2 has torch 2.11.0, n1 has 2.13.0",
        "n2 has 7 GPUs, n1 has 8",
        "n3 starts 4 processes, n1 8",
    ]


def test_a_taken_port_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert find_free_port(port) > port
        monkeypatch.setattr(preflight, "NUM_PORTS", 1)
        with pytest.raises(ConfigError, match="are all taken"):
            find_free_port(port)


def test_a_node_describes_itself_on_one_line(tmp_path: Path) -> None:
    report = inspect_node("n1", 2, tmp_path)
    assert not report.problems and report.free_bytes > 0
    line = describe(from_json(as_json(report)), "alone")
    assert line.startswith("n1: ok | python ") and "\n" not in line
    assert "no folder there" in inspect_node("n1", 2, tmp_path / "none").problems[0]
    assert "8 x H200, 140 GiB free each" in describe(REPORT, "alone")


def test_a_folder_that_is_not_shared_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "SHARED_SECONDS", 0.5)
    port = find_free_port(21000)

    def node(rank: int) -> tuple[str | None, str | None]:
        nodes = Nodes(rank, 2, "127.0.0.1", port)
        own = tmp_path / f"node-{rank}"
        own.mkdir()
        found = nodes.sees_shared_folder(tmp_path), nodes.sees_shared_folder(own)
        nodes.leave()
        return found

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(node, range(2))
    assert first == (None, None)
    assert second == (None, f"{tmp_path / 'node-1'} is not the same folder as on the first node")
    assert not list(tmp_path.rglob(".forgetscale-preflight-*"))


def test_a_silent_node_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "TIMEOUT_SECONDS", 0.5)
    with pytest.raises(ForgetScaleError, match=r"cannot reach|node 1 of 2 gave no answer"):
        Nodes(0, 2, "127.0.0.1", find_free_port(22000)).gather("report", {})


def test_it_needs_slurm_and_an_address(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("SLURM_NODEID", raising=False)
    assert main(["preflight", "--master", "here:1"]) == 2
    assert "runs once a node inside a SLURM job" in capsys.readouterr().err
    monkeypatch.setenv("SLURM_NODEID", "0")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "1")
    assert main(["preflight", "--master", "here"]) == 2
    assert "--master must be HOST:PORT, got 'here'" in capsys.readouterr().err

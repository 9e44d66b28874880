"""The rank server: real processes, time limits, exit codes."""

from __future__ import annotations

import os
import signal

import pytest

from tests.distributed.harness import Job, RankServer


@pytest.mark.parametrize("size", [1, 2, 3])
def test_ranks_are_processes_of_one_group(ranks: RankServer, size: int):
    values = ranks.must("misc:add_ranks", size).values
    assert [value["sum"] for value in values] == [size * (size - 1) / 2] * size
    assert len({os.getpid(), *(value["process"] for value in values)}) == size + 1


def test_groups_side_by_side_do_not_meet(ranks: RankServer):
    outcomes = ranks.run_all([Job("misc:add_ranks", {}, 2), Job("misc:add_ranks", {}, 3)])
    assert [outcome.value["sum"] for outcome in outcomes] == [1, 3]


def test_a_hang_ends_at_the_time_limit(ranks: RankServer):
    outcome = ranks.run("misc:hang", 2, rank=1, limit=1.5)
    assert outcome.late and -signal.SIGKILL in outcome.codes
    assert ranks.must("misc:add_ranks", 2).value["sum"] == 1, "the server goes on"


@pytest.mark.parametrize(("how", "code"), [("signal", -signal.SIGKILL), ("error", 1)])
def test_how_a_rank_ended(ranks: RankServer, how: str, code: int):
    outcome = ranks.run("misc:fail", 2, rank=1, how=how)
    assert outcome.codes[1] == code and outcome.codes[0] != 0 and not outcome.late
    assert ("a rank's own error" in outcome.logs[1]) == (how == "error")

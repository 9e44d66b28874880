"""Ranks that work on one job without a word to each other: failures, late ends, shared work."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from forgetscale.errors import CheckpointError
from forgetscale.knowledge import sign_of_life
from forgetscale.knowledge.sign_of_life import SILENT_SECONDS
from forgetscale.knowledge.work import Crew, until_published


@pytest.mark.parametrize("error", [RuntimeError("no reason"), MemoryError()])
def test_any_failure_of_a_rank_ends_those_who_wait_for_it(tmp_path: Path, error: Exception):
    with pytest.raises(type(error)), Crew(tmp_path, rank=1, size=2, visible=False):
        raise error
    with Crew(tmp_path, rank=0, size=2, visible=False) as crew:
        with pytest.raises(CheckpointError, match="rank 1 failed: .*Error.*start all again"):
            crew.wait_for(lambda: False)
    with Crew(tmp_path, rank=1, size=2, visible=False):  # started again: the note is gone
        assert not list(tmp_path.glob("*.failed"))


def test_who_is_late_may_find_the_work_folder_gone(tmp_path: Path):
    result = tmp_path / "result"

    def late(rank: int) -> None:
        with until_published(result, rank):
            raise FileNotFoundError("work folder")

    with pytest.raises(FileNotFoundError):
        late(1)
    result.mkdir()
    late(1)
    with pytest.raises(FileNotFoundError):
        late(0)


def test_one_process_does_the_shared_work_itself(tmp_path: Path):
    seen: list[tuple[str, bool]] = []

    def work(name: str, *, visible: bool) -> None:
        seen.append((name, visible))

    with Crew(tmp_path, visible=False) as crew:
        crew.everyone(work, ("a",))
    assert seen == [("a", False)]


def test_a_rank_has_one_process(tmp_path: Path):
    with Crew(tmp_path, visible=False), pytest.raises(CheckpointError, match="its own --rank"):
        with Crew(tmp_path, visible=False):
            raise AssertionError("two processes of one rank")


def make_old(path: Path) -> None:
    path.touch()
    before = path.stat().st_mtime - SILENT_SECONDS - 1
    os.utime(path, (before, before))


def test_a_killed_rank_is_not_waited_for(tmp_path: Path):
    with Crew(tmp_path, rank=0, size=3, visible=False) as crew:
        looks = iter([False, True])
        crew.wait_for(lambda: next(looks))  # the others may still be to come
        make_old(tmp_path / "rank-2.alive")
        with pytest.raises(CheckpointError, match="rank 2 gave no sign of life for 180 s"):
            crew.wait_for(lambda: False)
    assert not (tmp_path / "rank-0.alive").exists(), "who leaves is not waited for"


def test_one_killed_in_an_earlier_start_may_come_back(tmp_path: Path):
    make_old(tmp_path / "rank-1.alive")
    with Crew(tmp_path, rank=0, size=2, visible=False) as crew:
        looks = iter([False, False, True])
        crew.wait_for(lambda: next(looks))


def test_signs_go_on_while_a_rank_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sign_of_life, "SIGN_SECONDS", 0.01)
    with Crew(tmp_path, rank=0, size=2, visible=False):
        make_old(tmp_path / "rank-0.alive")
        old = (tmp_path / "rank-0.alive").stat().st_mtime
        deadline = time.monotonic() + 20
        while (tmp_path / "rank-0.alive").stat().st_mtime == old:
            assert time.monotonic() < deadline, "no further sign"
            time.sleep(0.01)

"""One file of a checkpoint: what stands on the disk is what was in memory, or it is an error."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
import torch

from forgetscale import points
from forgetscale.checkpoint.writing import Files, Work, write_file
from forgetscale.errors import CheckpointError


@pytest.fixture
def at():
    """Set what happens at labelled points."""
    yield lambda actions: points.set_hook(lambda label, path: actions.get(label, bool)(path))
    points.set_hook(None)


def test_bytes_and_tensors_follow_one_another(tmp_path: Path):
    values = torch.arange(7, dtype=torch.float32)
    strided = torch.arange(8, dtype=torch.float32)[::2]
    digest = write_file(tmp_path / "a", [b"head", values, torch.empty(0), strided])
    expected = b"head" + values.numpy().tobytes() + strided.numpy().tobytes()
    assert (tmp_path / "a").read_bytes() == expected
    assert digest == hashlib.sha256(expected).hexdigest()


def test_a_system_that_takes_a_part_is_asked_again(tmp_path: Path, monkeypatch):
    real = Path.open

    class Slow:
        def __init__(self, file):
            self._file = file

        def write(self, data):
            return self._file.write(data[:3])

        def __getattr__(self, name):
            return getattr(self._file, name)

        def __enter__(self):
            return self

        def __exit__(self, *rest):
            self._file.close()

    def opened(path, mode="r", *args, **options):
        file = real(path, mode, *args, **options)
        return Slow(file) if "x" in mode else file

    monkeypatch.setattr(Path, "open", opened)
    write_file(tmp_path / "a", [b"0123456789", torch.ones(2)])
    assert (tmp_path / "a").stat().st_size == 18


@pytest.mark.parametrize("label", ["file: written", "file: flushed"])
def test_other_content_on_the_disk_is_noticed(tmp_path: Path, at, label: str):
    at({label: lambda path: os.truncate(path, 5)})
    with pytest.raises(CheckpointError, match="reads back with other content than was written"):
        write_file(tmp_path / "a", [b"0123456789"])


def test_an_existing_file_is_never_written_over(tmp_path: Path):
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(FileExistsError):
        write_file(tmp_path / "a", [b"new"])
    assert (tmp_path / "a").read_bytes() == b"old"


@pytest.mark.parametrize("background", [True, False])
def test_work_keeps_its_error(tmp_path: Path, background: bool):
    files = Files(tmp_path / "none" / "deep", {"a": [b"x"]})
    work = Work(files.write, background=background)
    work.wait()
    assert work.ended and isinstance(work.error, FileNotFoundError) and not files.hashes


def test_files_tell_how_far_they_are(tmp_path: Path, at):
    seen = []
    files = Files(tmp_path, {"a": [b"1234", torch.ones(3)], "rng/b": [b"56"]})
    at({"file: begun": lambda path: seen.append(files.num_bytes)})
    files.write()
    assert seen == [4, 18] and files.num_bytes == 18
    assert sorted(files.hashes) == ["a", "rng/b"]

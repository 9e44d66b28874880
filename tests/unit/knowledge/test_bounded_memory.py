"""Models far larger than what a pass may allocate: sparse files, and a limit on address space."""

from __future__ import annotations

import contextlib
import json
import os
import resource
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from forgetscale.knowledge.counting import count_part, join_counts, join_refined, refine_part
from forgetscale.knowledge.edits import EditOptions
from forgetscale.knowledge.setup import Request, Setup, open_setup

WIDTH = 4096
CHANGED = 1000


def sparse_folder(directory: Path, shapes: dict[str, tuple[int, int]], last: np.ndarray) -> Path:
    """Write a model of zeros as a hole, but for the last fp32 values of the last tensor."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    header, place = {}, 0
    for name, shape in shapes.items():
        size = 4 * shape[0] * shape[1]
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [place, place + size]}
        place += size
    head = json.dumps(header).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        file.truncate(8 + len(head) + place)
        file.seek(-last.nbytes, os.SEEK_END)
        file.write(last.tobytes())
    return directory


def sparse_pair(folder: Path, num_bytes: int) -> tuple[Path, Path]:
    """Return two sparse models of ``num_bytes`` together; the tuned one has a few changes."""
    rows = num_bytes // 2 // 4 // WIDTH // 4
    shapes = {f"layers.{number}.w.weight": (rows, WIDTH) for number in range(4)}
    before = np.ones(CHANGED, np.float32)
    after = before + np.arange(1, CHANGED + 1, dtype=np.float32) / 1024
    pair = (
        sparse_folder(folder / "s", shapes, before),
        sparse_folder(folder / "t", shapes, after),
    )
    held = sum(path.stat().st_blocks * 512 for one in pair for path in one.iterdir())
    if held > 1 << 24:
        pytest.skip("the filesystem keeps no holes in files")
    return pair


def address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


@contextlib.contextmanager
def at_most(more: int) -> Iterator[None]:
    """Let this process map at most ``more`` bytes beyond what it has."""
    old = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (address_space() + more, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, old)


def threshold(setup: Setup) -> tuple[int | None, int]:
    """Return the one cut of a setup by both reading passes."""
    parts = range(len(setup.parts))
    places = join_counts(setup, [count_part(setup, part) for part in parts])
    refined = [refine_part(setup, part, places) for part in parts]
    cuts, _ = join_refined(setup, places, refined)
    return cuts[0, "all"]


def check(folder: Path, num_bytes: int, more: int) -> None:
    pair = sparse_pair(folder, num_bytes)
    elements = num_bytes // 2 // 4 // WIDTH // 4 * 4 * WIDTH
    wanted = 300
    options = EditOptions(score="absolute", fractions=(Fraction(wanted, elements),))
    setup = open_setup(Request(pair[0], (pair[1],), options, include="."))
    with at_most(more):
        key, equal = threshold(setup)
    smallest = torch.tensor((CHANGED - wanted + 1) / 1024).view(torch.int32)
    assert (key, equal) == (int(smallest), 1)


@pytest.mark.skipif(
    not Path("/proc/self/statm").is_file(), reason="Linux alone says what is mapped"
)
def test_a_pass_allocates_a_fraction_of_the_models(tmp_path: Path):
    """Two passes over 0.5 GB with 128 MB more than before; the limit itself is seen to hold."""
    with at_most(1 << 27), pytest.raises(RuntimeError, match="allocate"):
        torch.zeros(1 << 26, dtype=torch.float32)
    check(tmp_path, 1 << 29, 1 << 27)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_models_of_a_hundred_gigabytes(tmp_path: Path):
    """The same room is enough for a hundred times as much."""
    check(tmp_path, 100 << 30, 1 << 27)

"""Damaged token sets: every place is named by file, record batch and rows; nothing is delivered."""

from __future__ import annotations

import re
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.cli import main
from forgetscale.data import TokenSet, find_damages, open_stream, write_token_set
from forgetscale.errors import DataError

PLACE = re.compile(r"shard-0000(\d)-of-00003\.arrow .*record batch(?:es)? .*rows (\d+) to (\d+) ")
# The set of conftest.py: rows and record batches of each shard.
SHARDS = {0: (0, 8), 1: (9, 17), 2: (18, 22)}


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damage") / "set"
    rows = np.random.default_rng(0).integers(0, 300, (23, 6))
    lens = np.array([10, 4, 100, 24])
    write_token_set(
        folder,
        rows,
        vocab_size=300,
        tokenizer_sha256="ab" * 32,
        doc_lens=lens,
        batch_rows=3,
        shard_rows=9,
    )
    return folder


@pytest.fixture
def damaged(clean, tmp_path):
    return shutil.copytree(clean, tmp_path / "set")


def shard(folder, number):
    return folder / f"shard-0000{number}-of-00003.arrow"


def places(folder):
    """Return (shard, first row, last row) of every sentence; each must name all three."""
    found = []
    for sentence in find_damages(folder):
        match = PLACE.search(sentence)
        assert match is not None, sentence
        found.append(tuple(int(part) for part in match.groups()))
    return found


@settings(max_examples=60)
@given(number=st.integers(0, 2), place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_flipped_bit_is_refused_with_its_place(clean, tmp_path_factory, number, place, bit):
    folder = shutil.copytree(clean, tmp_path_factory.mktemp("flip") / "set")
    path = shard(folder, number)
    data = bytearray(path.read_bytes())
    offset = int(place * len(data))
    data[offset] ^= 1 << bit
    path.write_bytes(data)
    first, last = SHARDS[number]
    info = TokenSet(folder).payload["shards"][number]
    hit = [b["offset"] <= offset < b["offset"] + b["size"] for b in info["batches"]]
    if any(hit):
        start = first + sum(b["num_rows"] for b in info["batches"][: hit.index(True)])
        rows = (start, start + info["batches"][hit.index(True)]["num_rows"] - 1)
    else:
        rows = (first, last)  # the footer serves the whole shard
    assert places(folder) == [(number, *rows)]
    stream = open_stream(folder, seed=0, global_batch_size=23)
    with pytest.raises(DataError, match=path.name):
        next(stream)
    with pytest.raises(DataError, match=path.name):
        next(stream)


@settings(max_examples=30)
@given(number=st.integers(0, 2), keep=st.floats(0, 1, exclude_max=True))
def test_a_truncated_shard_is_refused_from_where_it_ends(clean, tmp_path_factory, number, keep):
    folder = shutil.copytree(clean, tmp_path_factory.mktemp("cut") / "set")
    path = shard(folder, number)
    data = path.read_bytes()
    kept = int(keep * len(data))
    path.write_bytes(data[:kept])
    info = TokenSet(clean).payload["shards"][number]
    whole = sum(b["offset"] + b["size"] <= kept for b in info["batches"])
    first, last = SHARDS[number]
    lost = whole if whole < len(info["batches"]) else 0
    start = first + sum(b["num_rows"] for b in info["batches"][:lost])
    assert places(folder) == [(number, start, last)]
    with pytest.raises(DataError, match=f"has {kept} bytes, expected {len(data)}"):
        open_stream(folder, seed=0, global_batch_size=1)


def test_several_damages_are_all_named(damaged):
    shard(damaged, 0).unlink()
    data = bytearray(shard(damaged, 1).read_bytes())
    data[len(data) // 2] ^= 1
    shard(damaged, 1).write_bytes(data)
    shard(damaged, 2).write_bytes(shard(damaged, 2).read_bytes() + b"\0")
    assert [place[0] for place in places(damaged)] == [0, 1, 2]
    assert places(damaged)[0] == (0, 0, 8)


def other_build(folder, **changes):
    settings = {
        "vocab_size": 300,
        "tokenizer_sha256": "ab" * 32,
        "doc_lens": np.array([10, 4, 100, 24]),
        "batch_rows": 3,
        "shard_rows": 9,
    }
    rows = np.random.default_rng(1).integers(0, 300, (23, 6))
    write_token_set(folder, rows, **settings | changes)
    return folder


def test_a_shard_of_another_build_is_refused(damaged, tmp_path, capsys):
    other = other_build(tmp_path / "other")
    shutil.copy(shard(other, 1), shard(damaged, 1))
    (sentence,) = find_damages(damaged)
    assert "of another build" in sentence
    assert "record batches 0 to 2, rows 9 to 17 of the set" in sentence
    assert main(["verify", str(damaged)]) == 2
    assert capsys.readouterr().err == f"error: {sentence}\n"
    with pytest.raises(DataError, match="00001-of-00003.arrow is damaged in record batch"):
        TokenSet(damaged).read([10])


def test_a_shard_of_another_build_and_size_is_refused(damaged, tmp_path):
    other = other_build(tmp_path / "other", batch_rows=9)
    shutil.copy(shard(other, 1), shard(damaged, 1))
    (sentence,) = find_damages(damaged)
    assert "cut off or of another build (record batches 0 to 2, rows 9 to 17 of" in sentence


def test_swapped_shards_are_refused(damaged):
    data = [shard(damaged, number).read_bytes() for number in (0, 1)]
    for number in (0, 1):
        shard(damaged, number).write_bytes(data[1 - number])
    assert places(damaged) == [(0, 0, 8), (1, 9, 17)]


def test_a_missing_shard_is_refused_by_every_command(damaged, capsys):
    shard(damaged, 2).unlink()
    for command in (["verify"], ["stats"], ["inspect", "--row", "0"]):
        assert main([command[0], str(damaged), *command[1:]]) == 2
        message = capsys.readouterr().err
        assert "00002-of-00003.arrow is missing (record batches 0 to 1, rows 18 to 22 of" in message

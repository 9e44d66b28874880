"""The stream: every row once per epoch, same global batches for any ranks, resume by one number."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from forgetscale.data import TokenSet, calibration_rows, open_stream, write_token_set
from forgetscale.errors import DataError


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Token sets by number of rows; the ids of row r are r."""
    folder = tmp_path_factory.mktemp("sets")
    made = {}

    def get(num_rows):
        if num_rows not in made:
            path = folder / str(num_rows)
            rows = np.repeat(np.arange(num_rows)[:, None], 3, axis=1)
            write_token_set(
                path, rows, vocab_size=100, tokenizer_sha256="", batch_rows=4, shard_rows=12
            )
            made[num_rows] = TokenSet(path)
        return made[num_rows]

    return get


def global_batches(token_set, *, batch, world, cursor, count, seed=5):
    """Read ``count`` global batches by ``world`` ranks; return the row ids of each."""
    streams = [
        open_stream(
            token_set,
            seed=seed,
            global_batch_size=batch,
            rank=rank,
            world_size=world,
            cursor=cursor,
        )
        for rank in range(world)
    ]
    found = []
    for _ in range(count):
        parts = [next(stream) for stream in streams]
        sizes = [len(part.row_ids) for part in parts]
        assert max(sizes) - min(sizes) <= 1
        assert len({part.cursor for part in parts}) == 1
        for part in parts:
            assert part.input_ids.dtype == part.row_ids.dtype == torch.int64
            assert torch.equal(part.input_ids, part.row_ids[:, None].expand(-1, 3))
        found.append(torch.cat([part.row_ids for part in parts]).tolist())
    return found, parts[0].cursor


@settings(deadline=None, max_examples=80)
@given(
    num_rows=st.integers(1, 40),
    batch=st.integers(1, 50),
    runs=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 6)), min_size=1, max_size=5),
)
def test_every_row_once_per_epoch_through_any_interruptions(sets, num_rows, batch, runs):
    """Each run has its own number of ranks and ends after some batches."""
    token_set = sets(num_rows)
    cursor, seen = 0, []
    for world, count in runs:
        found, cursor = global_batches(
            token_set, batch=batch, world=world, cursor=cursor, count=count
        )
        seen += found
    whole, end = global_batches(token_set, batch=batch, world=1, cursor=0, count=len(seen))
    assert seen == whole
    assert cursor == end == len(seen) * batch
    flat = list(itertools.chain.from_iterable(seen))
    for start in range(0, len(flat), num_rows):
        epoch = flat[start : start + num_rows]
        assert len(set(epoch)) == len(epoch)
        assert len(epoch) < num_rows or sorted(epoch) == list(range(num_rows))


@pytest.mark.parametrize("world", [2, 3])
def test_same_global_batches_for_any_world_size(sets, world):
    alone = global_batches(sets(23), batch=8, world=1, cursor=0, count=9)
    assert global_batches(sets(23), batch=8, world=world, cursor=0, count=9) == alone


def test_cursor_reopens_anywhere_and_batch_size_may_change(sets):
    whole, _ = global_batches(sets(23), batch=1, world=1, cursor=0, count=60)
    flat = [row for batch in whole for row in batch]
    stream = open_stream(sets(23), seed=5, global_batch_size=7, cursor=40)
    assert stream.epochs == (1,)
    batch = next(stream)
    assert batch.row_ids.tolist() == flat[40:47]
    assert batch.cursor == stream.cursor == 47


def test_seed_changes_the_order(sets):
    first, _ = global_batches(sets(40), batch=40, world=1, cursor=0, count=1, seed=1)
    second, _ = global_batches(sets(40), batch=40, world=1, cursor=0, count=1, seed=2)
    assert first != second


def test_batches_do_not_share_memory_with_the_file(sets):
    stream = open_stream(sets(23), seed=5, global_batch_size=4)
    batch = next(stream)
    row_ids = batch.row_ids.clone()
    batch.input_ids.zero_()
    batch.row_ids.zero_()
    again = next(open_stream(sets(23), seed=5, global_batch_size=4))
    assert torch.equal(again.row_ids, row_ids)
    assert torch.equal(again.input_ids[:, 0], row_ids)


def test_stream_stops_at_damage(set_path):
    shard = set_path / "shard-00000-of-00003.arrow"
    data = bytearray(shard.read_bytes())
    data[TokenSet(set_path).payload["shards"][0]["batches"][0]["offset"] + 300] ^= 4
    shard.write_bytes(data)
    stream = open_stream(set_path, seed=0, global_batch_size=23)
    for _ in range(2):  # asked again, it raises again and does not go on behind the damage
        with pytest.raises(DataError, match="record batch 0, rows 0 to 2"):
            next(stream)
        assert stream.cursor == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"global_batch_size": 0},
        {"global_batch_size": 1, "rank": 1},
        {"global_batch_size": 1, "rank": -1},
        {"global_batch_size": 1, "cursor": -1},
        {"global_batch_size": 1, "world_size": 0},
    ],
)
def test_impossible_numbers(set_path, wrong):
    with pytest.raises(ValueError, match="need global_batch_size >= 1"):
        open_stream(set_path, seed=0, **wrong)


def test_missing_set(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        open_stream(tmp_path / "none", seed=0, global_batch_size=1)


@pytest.mark.parametrize(
    ("total", "count", "step", "last"),
    [(1200, 500, 2, 998), (900, 500, 1, 499), (1700, 500, 3, 1497), (300, 300, 1, 299)],
)
def test_calibration_stride(total, count, step, last):
    """Worked numbers of the method note, 9.8."""
    rows = calibration_rows(total, 500)
    assert len(rows) == count
    assert rows[-1] == last
    assert all(b - a == step for a, b in itertools.pairwise(rows))


def test_calibration_numbers_are_checked():
    with pytest.raises(ValueError, match="must be >= 1"):
        calibration_rows(0, 500)

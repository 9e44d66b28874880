"""Skipped rows keep their place and lose their targets; lists last and change nothing else."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from forgetscale.config import MixtureDataConfig, MixtureSetConfig, TokenDataConfig
from forgetscale.data import (
    SKIP_LIST_FILE,
    SkipList,
    SkippedRow,
    open_data,
    open_stream,
    read_skips,
    settle_skips,
    write_token_set,
)
from forgetscale.errors import DataError

SIZES = {"a": 9, "b": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("sets")
    for name, size in SIZES.items():
        rows = np.repeat(np.arange(size)[:, None], 3, axis=1)
        write_token_set(path / name, rows, vocab_size=20 + size, tokenizer_sha256="")
    return path


@pytest.fixture(scope="module")
def single(folder):
    return open_data(TokenDataConfig(path=folder / "a"))


@pytest.fixture(scope="module")
def mixture(folder):
    sets = [MixtureSetConfig(path=folder / name, weight=1) for name in SIZES]
    return open_data(MixtureDataConfig(kind="mixture", sets=tuple(sets)))


def entry(data, row, first_position=0, part=0, reason="bad"):
    token_set = data.parts[part].token_set
    return SkippedRow(token_set.content_hash, row, reason, 0, first_position)


def read(data, skips, *, batch, count, cursor=0, world=1):
    streams = [
        open_stream(
            data,
            seed=3,
            global_batch_size=batch,
            rank=rank,
            world_size=world,
            cursor=cursor,
            skips=skips,
        )
        for rank in range(world)
    ]
    found = []
    for _ in range(count):
        parts = [next(stream) for stream in streams]
        assert len({part.cursor for part in parts}) == 1
        rows = torch.cat([torch.stack([p.set_ids, p.row_ids, p.skipped.long()], 1) for p in parts])
        found.append((parts[0].cursor, rows.tolist()))
    return found


@settings(deadline=None, max_examples=80)
@given(
    rows=st.sets(st.tuples(st.integers(0, 1), st.integers(0, 3)), max_size=8),
    batch=st.integers(1, 12),
    world=st.integers(1, 4),
    since=st.integers(0, 30),
)
def test_only_targets_change(mixture, rows, batch, world, since):
    skips = SkipList(mixture, [entry(mixture, row, since, part) for part, row in rows])
    plain = {}
    for cursor, batch_rows in read(mixture, None, batch=batch, count=30):
        plain[cursor] = [row[:2] for row in batch_rows]
    for cursor, batch_rows in read(mixture, skips, batch=batch, count=10, world=world):
        if cursor in plain:
            assert [row[:2] for row in batch_rows] == plain[cursor]
        for position, (part, row, skipped) in enumerate(batch_rows, start=cursor - batch):
            assert skipped == ((part, row) in rows and position >= since)
        assert not all(row[2] for row in batch_rows), "a batch without targets was delivered"


@settings(deadline=None, max_examples=60)
@given(
    early=st.sets(st.integers(0, 8), max_size=4),
    late=st.sets(st.integers(0, 8), max_size=4),
    steps=st.integers(1, 5),
    worlds=st.tuples(st.integers(1, 4), st.integers(1, 4)),
)
def test_a_longer_list_loses_and_repeats_nothing(single, early, late, steps, worlds):
    """A run that learns of more bad rows in the middle, resumed at another rank count."""
    first = SkipList(single, [entry(single, row) for row in early])
    before = read(single, first, batch=3, count=steps, world=worlds[0])
    cursor = before[-1][0]
    longer = first.with_entries([entry(single, row, cursor) for row in late - early])
    after = read(single, longer, batch=3, count=6, cursor=cursor, world=worlds[1])
    delivered = {}
    for end, rows in before + after:
        for position, row in enumerate(rows, start=end - 3):
            assert position not in delivered, "a position came twice"
            delivered[position] = row
    plain = [row for _, rows in read(single, None, batch=3, count=40) for row in rows]
    bad = early | late
    for position, row in delivered.items():
        assert row[:2] == plain[position][:2]
        assert row[2] == (row[1] in (bad if position >= cursor else early))
    missing = set(range(max(delivered) + 1)) - set(delivered)
    assert all(plain[position][1] in bad for position in missing), "a good row was passed over"
    # Falling back to the start replays the past bit for bit, with the longer list too.
    assert read(single, longer, batch=3, count=steps, world=worlds[1]) == before


def test_a_list_of_all_rows_is_refused(single):
    with pytest.raises(DataError, match="all 9 rows"):
        SkipList(single, [entry(single, row) for row in range(9)])


def test_rows_the_data_do_not_hold_are_refused(single):
    with pytest.raises(DataError, match="has rows 0 to 8"):
        SkipList(single, [entry(single, 9)])
    with pytest.raises(DataError, match="not part of the training data"):
        SkipList(single, [SkippedRow("f" * 64, 0, "", 0, 0)])


def test_metrics_count_skipped_rows_of_the_global_batch(single):
    skips = SkipList(single, [entry(single, row) for row in (1, 2)])
    batch = next(open_stream(single, seed=3, global_batch_size=9, skips=skips, world_size=3))
    assert batch.metrics == {"data/skipped_rows": 2}


class TestFiles:
    def given_file(self, path, *lines):
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return path

    def test_what_the_user_names_lasts(self, single, tmp_path):
        path = self.given_file(tmp_path / "bad.jsonl", '{"row": 4, "reason": "noise"}', "")
        skips = settle_skips(single, tmp_path, path, step=0, cursor=0)
        kept = json.loads((tmp_path / SKIP_LIST_FILE).read_text())
        token_set = single.parts[0].token_set
        assert kept == {
            "set": token_set.content_hash,
            "row": 4,
            "reason": "noise",
            "step": 0,
            "first_position": 0,
        }
        self.given_file(path, '{"row": 7}')
        longer = settle_skips(single, tmp_path, path, step=5, cursor=15)
        assert [(e.row, e.step, e.first_position) for e in longer.entries] == [
            (4, 0, 0),
            (7, 5, 15),
        ]
        assert settle_skips(single, tmp_path, None, step=9, cursor=27).entries == longer.entries
        again = settle_skips(single, tmp_path, path, step=9, cursor=27)
        assert again.entries == longer.entries, "named twice, written once"
        assert len(skips) == 1

    def test_mixtures_name_the_set(self, mixture, tmp_path):
        path = self.given_file(tmp_path / "bad.jsonl", '{"row": 1}')
        with pytest.raises(DataError, match=r"bad.jsonl:1: set is None.*each line names its own"):
            settle_skips(mixture, tmp_path, path, step=0, cursor=0)
        name = mixture.parts[1].token_set.content_hash
        self.given_file(path, json.dumps({"row": 1, "set": name}))
        skips = settle_skips(mixture, tmp_path, path, step=0, cursor=0)
        rows = [row for _, rows in read(mixture, skips, batch=4, count=8) for row in rows]
        assert all(row[2] == (row[:2] == [1, 1]) for row in rows)

    def test_a_refused_list_is_not_kept(self, single, tmp_path):
        path = self.given_file(tmp_path / "bad.jsonl", '{"row": 99}')
        with pytest.raises(DataError):
            settle_skips(single, tmp_path, path, step=0, cursor=0)
        assert not (tmp_path / SKIP_LIST_FILE).exists()

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("{", "not valid JSON"),
            ("[1]", "not an object"),
            ('{"row": "4"}', "row is '4', expected a whole number"),
            ('{"row": true}', "row is True, expected a whole number"),
            ('{"reason": "x"}', "row is None"),
            ('{"row": 4, "why": "x"}', "why is not a field"),
        ],
    )
    def test_mistakes(self, tmp_path, line, message):
        path = self.given_file(tmp_path / "bad.jsonl", line)
        with pytest.raises(DataError, match=message):
            read_skips(path, only_set="ab")

    def test_missing_file(self, tmp_path):
        with pytest.raises(DataError, match="is not a file"):
            read_skips(tmp_path / "none.jsonl")

"""``check --data``: good data pass, damage and a broken order do not."""

import re

import pytest

from forgetscale.cli.main import main
from forgetscale.data import order, stream
from tests.distributed import tiny


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    tiny.make_model(folder / "model")
    tiny.make_set(folder / "data", folder / "model", rows=70)
    tiny.make_set(folder / "more", folder / "model", rows=11, seed=2)
    (folder / "zero3.json").write_text((tiny.ROOT / "ds_configs" / "zero3.json").read_text())
    return folder


@pytest.fixture
def recipe(world, tmp_path):
    def write(**data):
        values = tiny.base_recipe(world, "x")
        values["data"] = data or {"path": str(world / "data")}
        return [
            "check",
            "--config",
            str(tiny.write_recipe(tmp_path / "run.yaml", values)),
            "--data",
        ]

    return write


def test_good_data_pass(recipe, capsys):
    assert main([*recipe(), "--schedules", "300"]) == 0
    text = capsys.readouterr().out
    assert "data: 0 damaged places" in text
    assert "data: epoch 1, 70 rows: 0 missing, 0 repeated" in text
    assert re.search(r"300 schedules .* 0 lost, 0 repeated; [\d,]+ global .* 0 different", text)


def test_a_mixture_with_skipped_rows_passes(recipe, world, tmp_path, capsys):
    skips = tmp_path / "bad.jsonl"
    name = tiny_hash(world / "more")
    skips.write_text("".join(f'{{"row": {row}, "set": "{name}"}}\n' for row in (1, 5)))
    sets = [{"path": str(world / "data"), "weight": 4}, {"path": str(world / "more"), "weight": 1}]
    options = recipe(kind="mixture", sets=sets, skip_rows=str(skips))
    assert main([*options, "--schedules", "200"]) == 0
    text = capsys.readouterr().out
    assert "skip list: 2 rows" in text
    assert "more: epoch 1, 11 rows: 0 missing, 0 repeated" in text


def tiny_hash(path):
    from forgetscale.data import TokenSet

    return TokenSet(path).content_hash


def test_an_order_that_names_a_row_twice_fails(recipe, monkeypatch, capsys):
    original = order.Permutation.__call__

    def twice(self, positions):
        found = original(self, positions)
        found[found == 3] = 4
        return found

    monkeypatch.setattr(order.Permutation, "__call__", twice)
    order._block.cache_clear()
    try:
        assert main([*recipe(), "--schedules", "5"]) == 1
    finally:
        order._block.cache_clear()
    streams = capsys.readouterr()
    assert "epoch 0, 70 rows: 1 missing, 1 repeated" in streams.out
    assert "the order of rows is not exact" in streams.err


def test_ranks_that_lose_rows_fail(recipe, monkeypatch, capsys):
    original = stream.RowStream.__init__

    def shorter(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self._count -= kwargs["rank"] == 3 and self._count > 0

    monkeypatch.setattr(stream.RowStream, "__init__", shorter)
    assert main([*recipe(), "--schedules", "50"]) == 1
    streams = capsys.readouterr()
    assert re.search(r"[1-9]\d* lost", streams.out)
    assert "do not train with it" in streams.err


def test_damage_is_named(recipe, world, tmp_path, capsys):
    tiny.make_set(tmp_path / "bad", world / "model", rows=30)
    shard = next((tmp_path / "bad").glob("*.arrow"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    assert main([*recipe(path=str(tmp_path / "bad")), "--schedules", "5"]) == 2
    streams = capsys.readouterr()
    assert "is damaged in record batch 0, rows 0 to 29" in streams.out
    assert "damaged places: 1" in streams.err


def test_no_schedules(recipe, capsys):
    assert main([*recipe(), "--schedules", "0"]) == 2
    assert "--schedules must be >= 1" in capsys.readouterr().err

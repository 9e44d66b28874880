"""Shards begun again beside a slow owner: sealed once, same bytes, whoever is first."""

from __future__ import annotations

import threading

import pytest

from forgetscale.config import validate_generate_recipe
from forgetscale.errors import ConfigError
from forgetscale.generation import store as store_module
from forgetscale.generation.store import RunStore
from tests.unit.generation.fake import DESCRIPTION, FakeDialogue, make_worker, sealed_bytes

NUM_IDS = 61


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    folder = tmp_path_factory.mktemp("expected")
    make_worker(folder, NUM_IDS).run()
    return sealed_bytes(folder)


def test_an_idle_worker_finishes_what_a_slow_one_holds(expected, tmp_path):
    """The slow one lives and holds its leases; when it comes back it changes nothing."""
    slow = make_worker(tmp_path, NUM_IDS, seed=1, name="slow")
    store, committed = RunStore.open(tmp_path, DESCRIPTION), set()
    while not committed:
        slow._advance()
        committed = {sample_id for shard in slow._held for sample_id in store.recover(shard)}
    quick = make_worker(tmp_path, NUM_IDS, seed=2, name="quick", copy_after_seconds=0.0)
    quick.run()
    assert sealed_bytes(tmp_path) == expected
    again = {sample_id for sample_id, _ in quick._source.started}
    assert not again & committed  # what is journaled is taken from there
    slow.run()
    assert sealed_bytes(tmp_path) == expected
    for name in ("leases", "journals"):
        assert not list((tmp_path / name).iterdir())


def test_owner_and_copy_meet_in_the_middle(tmp_path):
    """The copy begins with the last id, so that neither does all of it."""
    owner = make_worker(tmp_path, 8, name="owner", in_order=True)
    owner._engine.slots = 1
    copy = make_worker(tmp_path, 8, name="copy", in_order=True, copy_after_seconds=0.0)
    copy._engine.slots = 1
    while not RunStore.open(tmp_path, DESCRIPTION).sealed():
        owner._advance()
        copy._advance()
    for worker in (owner, copy):
        worker.run()
    first, last = ([n for n, attempt in w._source.started if not attempt] for w in (owner, copy))
    assert first == sorted(first) and last == sorted(last, reverse=True)
    assert len(first) < 8 and len(last) < 8 and set(first) | set(last) == set(range(8))


def test_workers_that_all_copy_seal_every_shard_once(expected, tmp_path):
    workers = [
        make_worker(tmp_path, NUM_IDS, seed=n, delay=0.002, copy_after_seconds=0.0)
        for n in range(5)
    ]
    threads = [threading.Thread(target=worker.run) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert sealed_bytes(tmp_path) == expected


def test_a_half_written_file_that_the_first_sealer_cleared(tmp_path, monkeypatch):
    """The second one finds its file gone: the shard is sealed, nothing is wrong."""
    store = RunStore.open(tmp_path, DESCRIPTION)
    samples = [FakeDialogue(n, 0).sample() for n in range(8)]
    real = store_module.fsync_path

    def slow(path):
        if ".tmp-" in path.name:
            monkeypatch.undo()
            assert store.seal(0, samples)
            store.clean(0, store.leases("first", 60.0))
        real(path)

    monkeypatch.setattr(store_module, "fsync_path", slow)
    assert not store.seal(0, samples)
    assert list(sealed_bytes(tmp_path)) == ["shard-000000.parquet"]


def test_without_the_field_workers_wait(tmp_path):
    owner = make_worker(tmp_path, 8, name="owner")
    owner._advance()
    idle = make_worker(tmp_path, 8, name="idle")
    for _ in range(3):
        assert idle._advance()
    assert not idle._source.started
    owner.run()


def test_its_range(tmp_path):
    values = {
        "model": {"path": "m", "dtype": "float32"},
        "generate": {"output_dir": "o", "num_dialogues": 1, "copy_after_seconds": -1.0},
    }
    with pytest.raises(ConfigError, match="copy_after_seconds must be >= 0"):
        validate_generate_recipe(values)

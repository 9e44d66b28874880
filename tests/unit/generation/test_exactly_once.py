"""Nothing lost, nothing twice: any number of workers, kills, takeovers, torn files, full disks."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest

from forgetscale.errors import ConfigError, DataError, ForgetScaleError, StoppedEarly
from forgetscale.generation import leases as leases_module
from forgetscale.generation import store as store_module
from forgetscale.generation.leases import LeaseTable, create_whole, highest_epochs, is_gone
from forgetscale.generation.records import ACCEPTED, FAILED, STATES
from forgetscale.generation.store import Journal, RunStore, read_journal
from tests.distributed.harness import ROOT
from tests.unit.generation.fake import (
    DESCRIPTION,
    FakeDialogue,
    make_plan,
    make_worker,
    sealed_bytes,
)

NUM_IDS = 61


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """Sealed files of one worker that nobody disturbs, ids in order."""
    folder = tmp_path_factory.mktemp("expected")
    worker = make_worker(folder, NUM_IDS)
    worker.run()
    files = sealed_bytes(folder)
    assert len(files) == 8
    return files


def all_samples(folder):
    store = RunStore.open(folder, DESCRIPTION)
    return [sample for shard in sorted(store.sealed()) for sample in store.read_shard(shard)]


def run_threads(folder, num_workers, **settings):
    workers = [make_worker(folder, NUM_IDS, seed=n + 1, **settings) for n in range(num_workers)]
    threads = [threading.Thread(target=worker.run) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return workers


@pytest.mark.parametrize("num_workers", [1, 2, 3, 7])
def test_any_number_of_workers_and_any_order(num_workers, expected, tmp_path):
    workers = run_threads(tmp_path, num_workers, lease_seconds=60.0)
    assert sealed_bytes(tmp_path) == expected
    started = [pair for worker in workers for pair in worker._source.started]
    assert len(started) == len(set(started))  # no id is generated twice
    for name in ("leases", "journals"):
        assert not list((tmp_path / name).iterdir())


def test_every_id_ends_in_one_state(expected, tmp_path):
    make_worker(tmp_path, NUM_IDS).run()
    samples = all_samples(tmp_path)
    assert [sample.sample_id for sample in samples] == list(range(NUM_IDS))
    assert all(sample.state in STATES for sample in samples)
    store = RunStore.open(tmp_path, DESCRIPTION)
    total = sum(store.counts(shard)[state] for shard in store.sealed() for state in STATES)
    assert total == NUM_IDS
    assert {sample.attempt for sample in samples if sample.state == ACCEPTED} == {0, 2}
    assert not any(sample.state == FAILED for sample in samples)


def start_process(folder, seed):
    return subprocess.Popen(
        [sys.executable, "-m", "tests.unit.generation.fake", str(folder)]
        + ["--num-ids", str(NUM_IDS), "--seed", str(seed), "--delay", "0.01"],
        cwd=ROOT,
    )


def work_done(folder):
    return sorted(path.name for path in folder.glob("journals/*"))


def kill_at_random(folder, chance, moments):
    """Kill all of a changing number of workers again and again; return how often in mid-work."""
    kills = 0
    for moment in range(moments):
        processes = [start_process(folder, 100 * moment + n) for n in range(chance.randint(1, 2))]
        before = work_done(folder)
        while work_done(folder) == before and any(p.poll() is None for p in processes):
            time.sleep(0.005)
        time.sleep(chance.random() * 0.3)
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            process.wait(30)
        kills += bool(work_done(folder))
    return kills


@pytest.mark.parametrize(
    "moments", [4, pytest.param(50, marks=pytest.mark.long)], ids=["few", "fifty"]
)
def test_killed_at_random_moments_with_changing_workers(moments, expected, tmp_path):
    kills = 0
    for round_number in range(1 if moments == 4 else 10):
        folder = tmp_path / str(round_number)
        kills += kill_at_random(folder, random.Random(round_number), 4 if moments == 4 else 5)
        make_worker(folder, NUM_IDS, seed=9, lease_seconds=30.0).run()
        assert sealed_bytes(folder) == expected
    assert kills > moments // 3


def test_a_committed_row_is_never_generated_again(tmp_path):
    store = RunStore.open(tmp_path, DESCRIPTION)
    lease = store.leases("first", 60.0).acquire(0, 0)
    journal = Journal(store.journal_path(0, lease.epoch), store.schema, 1)
    finished = FakeDialogue(3, 0).sample()
    finished.messages = [{"role": "user", "content": "as it was written first"}]
    journal.add(finished)
    journal.close()
    lease.release()
    worker = make_worker(tmp_path, 8)
    worker.run()
    assert (3, 0) not in worker._source.started
    assert store.read_shard(0)[3].messages == finished.messages


def test_two_workers_on_one_shard_seal_once(tmp_path):
    store = RunStore.open(tmp_path, DESCRIPTION)
    table = store.leases("one", 60.0)
    first = table.acquire(0, 0)
    assert table.acquire(0, 1) is None
    first.release()
    second = store.leases("two", 60.0).acquire(0, 1)
    assert second.epoch == 2 and not first.is_current() and second.is_current()
    samples = [FakeDialogue(n, 0).sample() for n in range(8)]
    assert store.seal(second.shard, samples)
    before = sealed_bytes(tmp_path)
    samples[0].messages = [{"role": "user", "content": "of the one thought dead"}]
    assert not store.seal(first.shard, samples)  # cannot overwrite
    assert sealed_bytes(tmp_path) == before


def test_a_worker_that_lost_its_shard_gives_up(tmp_path, monkeypatch):
    worker = make_worker(tmp_path, 8)
    store = RunStore.open(tmp_path, DESCRIPTION)
    worker._advance()
    held = worker._held[0]
    create_whole(
        held.lease.directory / "shard-000000.epoch-0002", held.lease.content(released=True)
    )
    while worker._held:
        worker._advance()
    assert not store.sealed()
    worker.run()  # takes epoch 3 and finishes
    assert store.sealed() == {0}
    assert [sample.sample_id for sample in store.read_shard(0)] == list(range(8))


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


def test_leases_do_not_trust_clocks(tmp_path, monkeypatch):
    monkeypatch.setattr(leases_module, "is_gone", lambda identity: False)  # another machine
    owner = LeaseTable(tmp_path, "owner", 60.0).acquire(5, 0)
    clock = Clock()
    observer = LeaseTable(tmp_path, "observer", 60.0, clock)
    # The owner's clock is days off: the file's times say nothing.
    os.utime(owner.path, (1, 1))
    assert observer.acquire(5, 1) is None
    clock.now += 59
    assert observer.acquire(5, 1) is None
    owner.show_life()
    os.utime(owner.path, (2**33, 2**33))
    clock.now += 59
    assert observer.acquire(5, 1) is None  # the counter moved: patience starts again
    clock.now += 59
    assert observer.acquire(5, 1) is None
    clock.now += 2
    assert observer.acquire(5, 1).epoch == 2
    assert not owner.is_current()


def test_an_emptied_lease_file_does_not_block_for_ever(tmp_path):
    owner = LeaseTable(tmp_path, "owner", 60.0).acquire(0, 0)
    owner.path.write_bytes(b"")
    clock = Clock()
    observer = LeaseTable(tmp_path, "observer", 60.0, clock)
    assert observer.acquire(0, 1) is None
    clock.now += 61
    assert observer.acquire(0, 1).epoch == 2


def test_a_process_of_this_machine_that_is_gone_is_known_at_once(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    identity = leases_module.process_identity(process.pid)
    assert not is_gone(identity)
    process.kill()
    process.communicate()
    assert is_gone(identity)
    assert not is_gone(identity | {"boot": "of another machine"})


def test_torn_and_changed_journals(tmp_path):
    store = RunStore.open(tmp_path, DESCRIPTION)
    path = store.journal_path(0, 1)
    journal = Journal(path, store.schema, 2)
    samples = [FakeDialogue(n, 0).sample() for n in range(8)]
    for sample in samples:
        journal.add(sample)
    journal.close()
    whole = path.read_bytes()
    assert read_journal(path, store.schema) == samples
    seen = set()
    for size in range(0, len(whole), 97):
        path.write_bytes(whole[:size])
        found = read_journal(path, store.schema)
        assert found == samples[: len(found)]
        seen.add(len(found))
    assert seen == {0, 2, 4, 6}
    chance = random.Random(0)
    for _ in range(60):
        damaged = bytearray(whole)
        damaged[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        path.write_bytes(bytes(damaged))
        found = read_journal(path, store.schema)
        assert found == samples[: len(found)] and len(found) < 8


def test_half_written_files_are_ignored_and_cleared(expected, tmp_path):
    store = RunStore.open(tmp_path, DESCRIPTION)
    (tmp_path / "shards" / ".shard-000000.parquet.tmp-abc").write_bytes(b"PAR1 half")
    (tmp_path / "leases" / ".shard-000000.epoch-0001.tmp-abc").write_bytes(b"{")
    assert store.sealed() == set() and highest_epochs(tmp_path / "leases") == {}
    make_worker(tmp_path, NUM_IDS).run()
    assert sealed_bytes(tmp_path) == expected


@pytest.mark.parametrize("moment", ["written", "linked"])
def test_killed_while_sealing(moment, expected, tmp_path, monkeypatch):
    """Dies with the file written but not yet named, or named but not yet cleaned up."""

    class Killed(BaseException):
        pass

    real = os.link

    def link(source, target):
        if str(target).endswith(".parquet"):
            if moment == "linked":
                real(source, target)
            raise Killed
        real(source, target)

    monkeypatch.setattr(store_module.os, "link", link)
    worker = make_worker(tmp_path, NUM_IDS)
    with pytest.raises(Killed):
        worker.run()
    monkeypatch.undo()
    for path in (tmp_path / "leases").iterdir():  # as of a process that is gone
        path.write_text('{"worker": "x", "beat": 0, "released": true, "process": null}')
    make_worker(tmp_path, NUM_IDS, seed=3).run()
    assert sealed_bytes(tmp_path) == expected


def test_stopped_on_request_goes_on(expected, tmp_path):
    worker = make_worker(tmp_path, NUM_IDS)
    steps = iter(range(40))
    worker._should_stop = lambda: next(steps, None) is None
    with pytest.raises(StoppedEarly):
        worker.run()
    make_worker(tmp_path, NUM_IDS, seed=2).run()
    assert sealed_bytes(tmp_path) == expected


def test_another_recipe_in_the_folder(tmp_path):
    make_worker(tmp_path, 8).run()
    with pytest.raises(ConfigError, match=r"another generation \(seed differ\)"):
        RunStore.open(tmp_path, DESCRIPTION | {"seed": 8})
    (tmp_path / "run.json").unlink()
    with pytest.raises(ConfigError, match="holds shards but no run.json"):
        RunStore.open(tmp_path, DESCRIPTION)


def test_a_shard_of_another_run_or_damaged_is_refused(tmp_path):
    make_worker(tmp_path / "a", 8).run()
    other = RunStore.open(tmp_path / "b", DESCRIPTION | {"seed": 8})
    target = other.shard_path(0)
    target.write_bytes((tmp_path / "a" / "shards" / "shard-000000.parquet").read_bytes())
    with pytest.raises(DataError, match="belongs to another run"):
        other.read_shard(0)
    target.write_bytes(target.read_bytes()[:-40])
    with pytest.raises(DataError, match="cannot be read"):
        other.read_shard(0)


def test_full_disk(expected, tmp_path, monkeypatch):
    worker = make_worker(tmp_path, NUM_IDS)
    count = iter(range(7))
    real = os.fsync

    def fsync(descriptor):
        if next(count, None) is None:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(store_module.os, "fsync", fsync)
    with pytest.raises(ForgetScaleError, match="no space left"):
        worker.run()
    monkeypatch.undo()
    make_worker(tmp_path, NUM_IDS, seed=4).run()
    assert sealed_bytes(tmp_path) == expected


def test_a_run_that_rejects_nearly_everything_stops(tmp_path):
    with pytest.raises(DataError, match=r"of 2\d\d dialogues .* accepted \(rejected/short"):
        make_worker(tmp_path, 900, min_accepted_fraction=0.95).run()
    assert len(RunStore.open(tmp_path, DESCRIPTION).sealed()) < make_plan(900).first_shards


def test_a_stuck_worker_stops_showing_life(tmp_path):
    worker = make_worker(tmp_path, NUM_IDS, lease_seconds=0.05)
    worker._advance()
    held = next(iter(worker._held.values()))
    stop = threading.Event()
    heart = threading.Thread(target=worker._beat, args=(stop,))
    heart.start()
    time.sleep(0.2)
    moved = held.lease.beat
    worker._last_step -= 100
    time.sleep(0.1)
    still = held.lease.beat
    time.sleep(0.1)
    stop.set()
    heart.join()
    worker._let_go()
    assert moved > 0 and held.lease.beat == still

"""Selection without bias, filters that do not depend on order, workers without work."""

from __future__ import annotations

import random
import statistics
import threading

import numpy as np
import pytest
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from forgetscale.config import DialogueFilterConfig
from forgetscale.generation.filters import DialogueFilter, duplicate_flags
from forgetscale.generation.records import ACCEPTED
from forgetscale.generation.store import RunStore
from tests.unit.generation.fake import DESCRIPTION, FakeDialogue, FakeEngine, make_worker

WORDS = ("town", "river", "rose", "Who", "rules", "the", "year", "3")
TEXTS = st.lists(st.sampled_from(WORDS), min_size=0, max_size=40).map(" ".join)
CONVERSATIONS = st.lists(st.tuples(TEXTS, TEXTS), min_size=0, max_size=12)


def test_the_first_by_id_are_not_the_shortest():
    """Short dialogues finish early: the first to finish are short, the first by id are not."""
    count, wanted = 600, 200
    engine = FakeEngine(64, 3)
    waiting = [FakeDialogue(n, 0) for n in range(count)]
    lengths = [dialogue.length for dialogue in waiting]
    finished = []
    while waiting or engine.num_busy:
        while waiting and engine.num_free:
            engine.submit(waiting.pop(0))
        finished += [dialogue.sample_id for dialogue in engine.step()]
    assert sorted(finished) == list(range(count))
    spread = statistics.stdev(lengths) / wanted**0.5
    mean = statistics.mean(lengths)
    by_id = statistics.mean(lengths[n] for n in sorted(finished)[:wanted])
    by_time = statistics.mean(lengths[n] for n in finished[:wanted])
    assert abs(by_id - mean) < 4 * spread
    assert by_time < by_id


def test_the_same_ids_are_taken_however_long_each_takes(tmp_path):
    taken = []
    for seed in range(3):
        folder = tmp_path / str(seed)
        make_worker(folder, 61, seed=seed).run()
        store = RunStore.open(folder, DESCRIPTION)
        samples = [s for shard in sorted(store.sealed()) for s in store.read_shard(shard)]
        taken.append([s.sample_id for s in samples if s.state == ACCEPTED][:20])
    assert taken[0] == taken[1] == taken[2] == sorted(taken[0])


def kept(rows, rules, rule):
    """Return the places of the rows that are kept, in order."""
    judged = [
        place
        for place, (user, assistant) in enumerate(rows)
        if rules.reason_to_reject(
            [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}],
            is_cut=False,
        )
        is None
    ]
    exact, near = duplicate_flags([rows[place][0] for place in judged], rule, 0.8)
    return [place for place, bad in zip(judged, exact | near, strict=True) if not bad]


@given(rows=CONVERSATIONS, rule=st.sampled_from(["none", "exact", "near"]))
@settings(max_examples=60, deadline=None)
def test_filtering_twice_filters_once(rows, rule):
    rules = DialogueFilter(DialogueFilterConfig(max_repeated_fraction=0.4))
    once = [rows[place] for place in kept(rows, rules, rule)]
    assert [once[place] for place in kept(once, rules, rule)] == once


@given(rows=CONVERSATIONS, seed=st.integers(0, 99), rule=st.sampled_from(["none", "exact"]))
@settings(max_examples=60, deadline=None)
def test_filtering_does_not_depend_on_order(rows, seed, rule):
    """The same texts are kept in any order; of equal ones, whichever has the lowest id."""
    rules = DialogueFilter(DialogueFilterConfig(max_repeated_fraction=0.4))
    mixed = random.Random(seed).sample(rows, len(rows))

    def texts(chosen):
        found = [chosen[place] for place in kept(chosen, rules, rule)]
        return sorted(user if rule == "exact" else f"{user}|{text}" for user, text in found)

    def normal(found):
        return sorted(" ".join(text.casefold().split()) for text in found)

    passing = [row for row in rows if kept([row], rules, "none")]
    if rule == "exact":
        # A row that is rejected shields no other: only accepted rows are compared.
        assert normal(set(normal(texts(rows)))) == normal(texts(rows))
        assert len(texts(rows)) == len({" ".join(u.casefold().split()) for u, _ in passing})
    assert normal(texts(rows)) == normal(texts(mixed))


def test_workers_without_work_end_and_no_worker_calls_a_collective(tmp_path, monkeypatch):
    """Seven workers, two shards, one of them with a single id."""

    def refuse(*args, **kwargs):
        raise AssertionError("a worker of its own takes part in no collective")

    for name in ("all_reduce", "broadcast", "all_gather_object", "barrier", "gather_object"):
        monkeypatch.setattr(dist, name, refuse)
    workers = [make_worker(tmp_path, 9, seed=n) for n in range(7)]
    threads = [threading.Thread(target=worker.run) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    store = RunStore.open(tmp_path, DESCRIPTION)
    assert [len(store.read_shard(shard)) for shard in (0, 1)] == [8, 1]
    assert sum(not worker._source.started for worker in workers) >= 5


@pytest.mark.parametrize("count", [0, 1, 2])
def test_duplicate_flags_of_few_texts(count):
    exact, near = duplicate_flags(["Who?", " who? "][:count], "near", 0.8)
    assert exact.tolist() == [False, True][:count] and not near.any()
    assert exact.dtype == near.dtype == np.bool_

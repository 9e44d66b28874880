"""One worker: takes shards, keeps its engine full, journals, seals. No word with other workers.

Loop: while the engine has room, submit the next id of the shards this worker owns, taking another
shard when those run out; let the engine work; journal what ended; seal a shard when its last id
has ended. Slots are filled across shards, so a long dialogue at the end of one does not stop the
others. A worker that finds nothing more to take begins a shard of another one again, from its last
id backwards, beside its owner: whoever has all of it first seals it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import threading
import time
import zlib
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from forgetscale.errors import DataError, ForgetScaleError, StoppedEarly
from forgetscale.generation.engines.base import Dialogue, Engine
from forgetscale.generation.leases import Lease, highest_epochs
from forgetscale.generation.plan import SamplePlan
from forgetscale.generation.records import ACCEPTED, FAILED, STATES, Sample
from forgetscale.generation.store import Journal, RunStore

_EARLY_IDS = 256
_STUCK_LEASES = 20
_LOG_SECONDS = 5.0


class DialogueSource(Protocol):
    """Begins the dialogue of each id."""

    def start(self, sample_id: int, attempt: int) -> Dialogue:
        """Return the dialogue of an id at its beginning; a function of its arguments alone."""
        ...


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """How a worker works; nothing of this changes what is written.

    Attributes:
        name: Name of the worker, not used by another one.
        lease_seconds: See ``LeaseTable``.
        journal_rows: See ``Journal``.
        max_attempts: Tries of an id that fails, > 0.
        min_accepted_fraction: Stop if less is accepted, 0..1.
        order: Order in which the ids of a shard are begun.
        copy_after_seconds: How long a worker is idle before it begins a shard again that another
            one has, >= 0; None: it never does.
    """

    name: str
    lease_seconds: float = 60.0
    journal_rows: int = 8
    max_attempts: int = 3
    min_accepted_fraction: float = 0.0
    order: Callable[[Sequence[int]], Sequence[int]] = tuple
    copy_after_seconds: float | None = None


def worker_name() -> str:
    """Return a name that no other worker has."""
    return f"{socket.gethostname()}-{os.getpid()}-{time.time_ns() % 10**9:09d}"


@dataclass(slots=True)
class _Held:
    """A shard this worker owns, or begins again beside its owner: without lease and journal."""

    shard: int
    lease: Lease | None
    journal: Journal | None
    waiting: deque[int]
    size: int
    done: dict[int, Sample] = field(default_factory=dict)

    @property
    def is_lost(self) -> bool:
        """Whether another worker has taken it over."""
        return self.lease is not None and not self.lease.is_current()


class Worker:
    """Generates shards until there are no more.

    Args:
        store: The run.
        plan: Its ids.
        source: Begins dialogues.
        engine: Runs the model.
        settings: How it works.
        report: Told done and total ids and a note, from time to time.
        should_stop: Asked between steps; True ends the worker with its work kept.
    """

    def __init__(
        self,
        store: RunStore,
        plan: SamplePlan,
        source: DialogueSource,
        engine: Engine,
        settings: WorkerSettings,
        *,
        report: Callable[[int, int, str], None] = lambda done, total, note: None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self._store = store
        self._plan = plan
        self._source = source
        self._engine = engine
        self._settings = settings
        self._report = report
        self._should_stop = should_stop
        self._leases = store.leases(settings.name, settings.lease_seconds)
        self._held: dict[int, _Held] = {}
        self._lock = threading.Lock()
        self._idle_since: float | None = None
        self._last_step = time.monotonic()
        self._heart_error: OSError | None = None
        self._log = _WorkerLog(store.directory / "workers" / f"{settings.name}.jsonl")

    def run(self) -> None:
        """Work until every shard of the present round is sealed, by this worker or others.

        Raises:
            DataError: Hardly anything is accepted.
            StoppedEarly: ``should_stop`` said so.
            ForgetScaleError: The disk is full.
        """
        stop = threading.Event()
        heart = threading.Thread(target=self._beat, args=(stop,), daemon=True)
        heart.start()
        try:
            while self._advance():
                pass
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise ForgetScaleError(
                f"{self._store.directory} has no space left; make room and start the workers again:"
                " finished dialogues are kept."
            ) from error
        finally:
            stop.set()
            heart.join()
            self._let_go()

    def _advance(self) -> bool:
        """Do one round of work; return False when there is nothing left to do."""
        if self._heart_error is not None:
            raise self._heart_error
        if self._should_stop():
            for held in self._held.values():
                if held.journal is not None:
                    held.journal.flush()
            raise StoppedEarly("stopped on request; start the same command again to go on.")
        has_more = self._fill()
        self._last_step = time.monotonic()
        if self._engine.num_busy:
            for dialogue in self._engine.step():
                self._finish(dialogue)
            self._idle_since = None
            return True
        if has_more and not self._begin_again():
            time.sleep(min(1.0, self._settings.lease_seconds / 10))
        return has_more

    def _fill(self) -> bool:
        """Submit ids while there is room; return whether shards of others are still unsealed."""
        while self._engine.num_free:
            shard = next((k for k, held in self._held.items() if held.waiting), None)
            if shard is None:
                shard, unsealed = self._take_shard()
                if shard is None:
                    return unsealed or bool(self._held)
                continue
            sample_id = self._held[shard].waiting.popleft()
            self._submit(sample_id, 0)
        return True

    def _submit(self, sample_id: int, attempt: int) -> None:
        dialogue = self._source.start(sample_id, attempt)
        if dialogue.is_over:
            self._finish(dialogue)
        else:
            self._engine.submit(dialogue)

    def _take_shard(self) -> tuple[int | None, bool]:
        """Own another shard if one is free; say whether any is unsealed."""
        sealed = self._store.sealed()
        shards = range(self._plan.num_shards(self._store))
        unsealed = [shard for shard in shards if shard not in sealed]
        epochs = highest_epochs(self._store.directory / "leases") if unsealed else {}
        for shard in unsealed:
            if shard in self._held:
                continue
            lease = self._leases.acquire(shard, epochs.get(shard, 0))
            if lease is None:
                continue
            if self._store.shard_path(shard).exists():  # sealed since the folder was listed
                self._store.clean(shard, self._leases)
                continue
            self._begin(lease)
            return shard, True
        return None, bool(unsealed)

    def _begin(self, lease: Lease) -> None:
        """Go on with a shard from the journals of its earlier owners."""
        ids = self._plan.shard_ids(lease.shard)
        done = self._store.recover(lease.shard)
        path = self._store.journal_path(lease.shard, lease.epoch)
        journal = Journal(path, self._store.schema, self._settings.journal_rows)
        waiting = deque(self._settings.order([item for item in ids if item not in done]))
        self._hold(_Held(lease.shard, lease, journal, waiting, len(ids), done))

    def _hold(self, held: _Held) -> None:
        with self._lock:
            self._held[held.shard] = held
        if len(held.done) == held.size:
            self._seal(held)

    def _begin_again(self) -> bool:
        """Begin a shard of another worker again after some time without work; say whether."""
        after, now = self._settings.copy_after_seconds, time.monotonic()
        if self._idle_since is None:
            self._idle_since = now
        if after is None or now - self._idle_since < after:
            return False
        sealed = self._store.sealed()
        shards = range(self._plan.num_shards(self._store))
        unsealed = [item for item in shards if item not in sealed and item not in self._held]
        if not unsealed:
            return False
        # Idle workers spread over what is left.
        shard = unsealed[zlib.crc32(self._settings.name.encode()) % len(unsealed)]
        ids, done = self._plan.shard_ids(shard), self._store.recover(shard)
        if self._store.shard_path(shard).exists():
            return True  # sealed since the folder was listed
        waiting = deque(reversed(self._settings.order([n for n in ids if n not in done])))
        self._hold(_Held(shard, None, None, waiting, len(ids), done))
        return True

    def _finish(self, dialogue: Dialogue) -> None:
        """Keep a finished sample, or try a failed one again."""
        shard = dialogue.sample_id // self._plan.shard_size
        sample = dialogue.sample()
        self._log.add(sample)
        held = self._held.get(shard)
        if held is None:  # the shard was taken over
            return
        if sample.state == FAILED and sample.attempt + 1 < self._settings.max_attempts:
            self._submit(sample.sample_id, sample.attempt + 1)
            return
        if self._store.shard_path(shard).exists():  # another one was first
            self._drop(shard)
            self._store.clean(shard, self._leases)
            return
        if held.is_lost:
            self._drop(shard)
            return
        held.done[sample.sample_id] = sample
        if held.journal is not None:
            held.journal.add(sample)
        else:
            held.done |= self._store.recover(shard)  # what the owner committed counts
            held.waiting = deque(item for item in held.waiting if item not in held.done)
        if len(held.done) == held.size:
            self._seal(held)

    def _seal(self, held: _Held) -> None:
        self._store.seal(held.shard, list(held.done.values()))
        self._drop(held.shard)
        self._store.clean(held.shard, self._leases)
        self._log.write()
        self._check_yield()

    def _drop(self, shard: int) -> None:
        with self._lock:
            held = self._held.pop(shard)
        if held.journal is not None:
            held.journal.close()

    def _let_go(self) -> None:
        """Give unfinished shards back; on a full disk others find out after ``lease_seconds``."""
        for shard, held in list(self._held.items()):
            self._drop(shard)
            with contextlib.suppress(OSError):
                if self._store.shard_path(shard).exists():
                    self._store.clean(shard, self._leases)
                elif held.lease is not None and held.lease.is_current():
                    held.lease.release()
        with contextlib.suppress(OSError):
            self._log.write()

    def _check_yield(self) -> None:
        """Report progress; stop a run that would reject nearly everything."""
        sealed = sorted(self._store.sealed())
        counts: Counter[str] = Counter()
        for shard in sealed:
            counts += self._store.counts(shard)
        finished = sum(counts[state] for state in STATES)
        total = self._plan.total_ids(self._store)
        self._report(finished, total, f"{counts[ACCEPTED]} accepted")
        if finished >= _EARLY_IDS:
            require_yield(counts, self._settings.min_accepted_fraction, self._store.directory)

    def _beat(self, stop: threading.Event) -> None:
        """Show life for all shards while the main loop moves."""
        lease_seconds = self._settings.lease_seconds
        while not stop.wait(lease_seconds / 5):
            if time.monotonic() - self._last_step > _STUCK_LEASES * lease_seconds:
                continue  # stuck: others may take over
            with self._lock:
                try:
                    for held in self._held.values():
                        if held.lease is not None and held.lease.is_current():
                            held.lease.show_life()
                except OSError as error:
                    self._heart_error = error
                    return


def require_yield(counts: Counter[str], least: float, directory: Path) -> None:
    """Refuse to go on where hardly anything is accepted.

    Args:
        counts: Samples by state, and by ``STATE/REASON``.
        least: Least accepted share, 0..1.
        directory: Named in the error.

    Raises:
        DataError: Less is accepted; the message gives the reasons.
    """
    finished = sum(counts[state] for state in STATES)
    if finished and counts[ACCEPTED] >= max(least * finished, 1):
        return
    reasons = [(count, name) for name, count in counts.items() if "/" in name]
    shown = ", ".join(f"{name} {count}" for count, name in sorted(reasons, reverse=True)[:5])
    raise DataError(
        f"only {counts[ACCEPTED]} of {finished} dialogues in {directory} are accepted ({shown});"
        " look at the shards there, then change generate.dialogue or generate.filters and name"
        " another generate.output_dir."
    )


class _WorkerLog:
    """What this worker did when, for ``--status``: the only place with clocks in it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._counts: dict[str, Any] = {"samples": 0, "tokens": 0}
        self._start = time.monotonic()
        self._last = self._start

    def add(self, sample: Sample) -> None:
        """Count a sample; write a line now and then."""
        self._counts["samples"] += 1
        self._counts["tokens"] += sample.num_generated_tokens
        if time.monotonic() - self._last > _LOG_SECONDS:
            self.write()

    def write(self) -> None:
        """Write a line."""
        self._last = time.monotonic()
        line = {"time": time.time(), "seconds": self._last - self._start, **self._counts}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

"""How far a run is, from its folder alone: asks no worker and changes nothing."""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from forgetscale.artifact import MANIFEST_NAME, canonical_json, hash_bytes
from forgetscale.generation.leases import highest_epochs, read_lease
from forgetscale.generation.plan import ROUNDS_FILE
from forgetscale.generation.records import ACCEPTED, STATES, Sample
from forgetscale.generation.store import RESULT, RunStore, read_description, read_journal

_WINDOW_SECONDS = 120.0
_SLOW = 3.0


@dataclass(slots=True)
class RunStatus:
    """How far a run is.

    Attributes:
        num_shards: Shards of the present round.
        num_sealed: Sealed ones.
        num_ids: Ids of the present round.
        counts: Finished samples by state and ``STATE/REASON``; those in journals count.
        tokens_per_second: Of the workers that wrote to their log lately.
        ids_per_second: The same in ids.
        seconds_left: For the present round, or None.
        workers: Name, ids and tokens per second, seconds since the last line of its log.
        stragglers: Shards in progress that lag behind: number, worker, finished ids, reason.
        is_published: Whether the result is there.
    """

    num_shards: int
    num_sealed: int
    num_ids: int
    counts: Counter[str] = field(default_factory=Counter)
    tokens_per_second: float = 0.0
    ids_per_second: float = 0.0
    seconds_left: float | None = None
    workers: list[dict[str, Any]] = field(default_factory=list)
    stragglers: list[dict[str, Any]] = field(default_factory=list)
    is_published: bool = False

    @property
    def num_done(self) -> int:
        """Finished ids."""
        return sum(self.counts[state] for state in STATES)

    def lines(self) -> list[str]:
        """Return what a person reads."""
        left = "unknown" if self.seconds_left is None else _duration(self.seconds_left)
        found = [
            f"done {self.num_done}/{self.num_ids} ids ({self.num_sealed}/{self.num_shards} shards"
            f" sealed), {self.counts[ACCEPTED]} accepted"
            + (", result published" if self.is_published else "")
        ]
        reasons = [(n, name) for name, n in self.counts.items() if "/" in name]
        found += [f"  {name}: {number}" for number, name in sorted(reasons, reverse=True)]
        if not self.is_published:
            found.append(
                f"rate {self.tokens_per_second:.0f} tokens/s, {self.ids_per_second:.2f} ids/s from"
                f" {len(self.workers)} workers; time left {left}"
            )
        for item in self.stragglers:
            found.append(
                f"straggler: shard {item['shard']} of {item['worker']}, {item['done']} of"
                f" {item['size']} ids, {item['why']}"
            )
        return found


def read_status(directory: Path) -> RunStatus:
    """Return how far the run in ``directory`` is.

    Rates and idle times compare the clocks of workers with this machine's: good enough to look at.
    Nothing that decides what is written uses them.

    Raises:
        ConfigError: It is no folder of a generation.
    """
    description = read_description(directory)
    store = RunStore(directory, hash_bytes(canonical_json(description)))
    generate = description["recipe"]
    size, num_ids = int(generate["shard_size"]), _num_ids(description, directory)
    num_shards = -(-num_ids // size)
    sealed = store.sealed()
    status = RunStatus(num_shards, len(sealed), num_ids)
    for shard in sealed:
        status.counts += store.counts(shard)
    status.is_published = (Path(directory) / RESULT / MANIFEST_NAME).exists()
    status.workers = _workers(Path(directory) / "workers")
    status.tokens_per_second = sum(worker["tokens_per_second"] for worker in status.workers)
    status.ids_per_second = sum(worker["ids_per_second"] for worker in status.workers)
    in_progress = _in_progress(store, size, num_ids, sealed, status)
    status.stragglers = [item for item in in_progress if item["why"]]
    if status.ids_per_second > 0:
        status.seconds_left = max(0, num_ids - status.num_done) / status.ids_per_second
    return status


def _num_ids(description: dict[str, Any], directory: Path) -> int:
    size = int(description["recipe"]["shard_size"])
    rounds = Path(directory) / ROUNDS_FILE
    if rounds.exists():
        return int(json.loads(rounds.read_bytes())["num_shards"]) * size
    if description.get("num_ids") is not None:
        return int(description["num_ids"])
    generate = description["recipe"]
    wanted = generate["num_dialogues"] * generate["over_generation"]
    return int(-(-wanted // size) * size)


def _workers(directory: Path) -> list[dict[str, Any]]:
    """Return the workers that wrote to their log lately, with their rates."""
    found = []
    for path in sorted(directory.glob("*.jsonl")):
        lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
        if not lines:
            continue
        last = lines[-1]
        idle = time.time() - last["time"]
        if idle > _WINDOW_SECONDS:
            continue
        older = [line for line in lines if last["seconds"] - line["seconds"] > _WINDOW_SECONDS]
        first = older[-1] if older else {"seconds": 0.0, "tokens": 0, "samples": 0}
        seconds = max(last["seconds"] - first["seconds"], 1e-9)
        found.append(
            {
                "worker": path.stem,
                "tokens_per_second": (last["tokens"] - first["tokens"]) / seconds,
                "ids_per_second": (last["samples"] - first["samples"]) / seconds,
                "idle_seconds": idle,
            }
        )
    return found


def _in_progress(
    store: RunStore, size: int, num_ids: int, sealed: set[int], status: RunStatus
) -> list[dict[str, Any]]:
    """Return the shards that somebody works on; count what their journals hold."""
    directory = store.directory / "leases"
    rates = {worker["worker"]: worker["ids_per_second"] for worker in status.workers}
    usual = sorted(rates.values())[len(rates) // 2] if rates else 0.0
    found = []
    for shard, epoch in sorted(highest_epochs(directory).items()):
        lease = read_lease(directory, shard, epoch)
        if shard in sealed or lease is None or shard * size >= num_ids:
            continue
        done: dict[int, Sample] = {}
        for path in store.journals(shard):
            done |= {sample.sample_id: sample for sample in read_journal(path, store.schema)}
        for sample in done.values():
            status.counts[sample.state] += 1
            if sample.reason:
                status.counts[f"{sample.state}/{sample.reason}"] += 1
        worker = lease["worker"]
        why = ""
        if lease["released"]:
            why = "given back, waits for a worker"
        elif worker not in rates:
            why = f"no sign of its worker for {_WINDOW_SECONDS:.0f} s or more"
        elif rates[worker] * _SLOW < usual:
            why = f"{rates[worker]:.2f} ids/s, others {usual:.2f}"
        found.append(
            {
                "shard": shard,
                "worker": worker,
                "done": len(done),
                "size": min(size, num_ids - shard * size),
                "why": why,
            }
        )
    return found


def _duration(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"

"""A generator without a model: dialogues whose tokens are hashes, and an engine with slots.

Also a command, ``python -m tests.unit.generation.fake DIR ...``: one worker, to be killed.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import time
from pathlib import Path

from forgetscale.generation.engines.base import TurnSampling
from forgetscale.generation.plan import SamplePlan
from forgetscale.generation.records import ACCEPTED, FAILED, REJECTED, Sample, Turn
from forgetscale.generation.store import RunStore
from forgetscale.generation.worker import Worker, WorkerSettings

DESCRIPTION = {"what": "fake", "seed": 7}


def number(*key: object) -> int:
    text = "/".join(map(str, key)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=6).digest(), "big")


class FakeDialogue:
    """Ends after a hashed number of tokens; some are rejected, some fail at first."""

    num_top = 0
    is_over = False

    def __init__(self, sample_id: int, attempt: int) -> None:
        self.sample_id, self.attempt = sample_id, attempt
        self.ids = [1, sample_id]
        self.length = 1 + number("length", sample_id) % 9
        self.sampling = TurnSampling(1.0, 1.0, 0, number("seed", sample_id, attempt), 9, (0,))

    def push(self, token, log_prob, top_ids=(), top_log_probs=()):
        self.ids.append(token)
        return None if len(self.ids) - 2 == self.length else len(self.ids) - 1

    def fail(self, reason):
        raise AssertionError(f"no turn of the fake fails, got {reason}")

    def sample(self) -> Sample:
        chance = number("state", self.sample_id) % 10
        state, reason = (REJECTED, "short") if chance < 2 else (ACCEPTED, "")
        if number("fails", self.sample_id) % 17 == 0 and self.attempt < 2:
            state, reason = FAILED, "not_finite"
        return Sample(
            self.sample_id,
            self.attempt,
            state,
            reason,
            messages=[{"role": "user", "content": f"question {number('q', self.sample_id) % 40}"}],
            input_ids=self.ids,
            supervised=[(2, len(self.ids))],
            turns=[Turn("assistant", 2, len(self.ids), "stop")],
            log_probs=[None, None, *(-0.5 * n for n in range(self.length))],
            seeds=[self.sampling.seed],
        )


class FakeSource:
    def __init__(self) -> None:
        self.started: list[tuple[int, int]] = []

    def start(self, sample_id: int, attempt: int) -> FakeDialogue:
        self.started.append((sample_id, attempt))
        return FakeDialogue(sample_id, attempt)


class FakeEngine:
    """Advances a few random dialogues in each step, so that they end in any order."""

    def __init__(self, slots: int, seed: int, delay: float = 0.0) -> None:
        self.slots, self.delay = slots, delay
        self.random = random.Random(seed)
        self.running: list[FakeDialogue] = []

    @property
    def num_free(self) -> int:
        return self.slots - len(self.running)

    @property
    def num_busy(self) -> int:
        return len(self.running)

    def submit(self, dialogue: FakeDialogue) -> None:
        assert self.num_free
        self.running.append(dialogue)

    def step(self) -> list[FakeDialogue]:
        time.sleep(self.delay)
        ended = []
        for dialogue in self.random.sample(self.running, max(1, len(self.running) // 2)):
            token = number("token", dialogue.sampling.seed, len(dialogue.ids)) % 1000
            if dialogue.push(token, -1.0) is None:
                self.running.remove(dialogue)
                ended.append(dialogue)
        return ended


def make_plan(num_ids: int, shard_size: int = 8) -> SamplePlan:
    return SamplePlan(shard_size, None, num_ids, 1.0)


def make_worker(
    folder: Path,
    num_ids: int,
    *,
    seed: int = 0,
    delay: float = 0.0,
    name: str = "",
    in_order: bool = False,
    **settings,
) -> Worker:
    store = RunStore.open(folder, DESCRIPTION)
    mixed = random.Random(seed)
    return Worker(
        store,
        make_plan(num_ids),
        FakeSource(),
        FakeEngine(5, seed, delay),
        WorkerSettings(
            name or f"worker-{seed}",
            journal_rows=2,
            order=tuple if in_order else lambda ids: mixed.sample(list(ids), len(ids)),
            **settings,
        ),
    )


def sealed_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "shards").iterdir())}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--num-ids", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--delay", type=float, default=0.0)
    options = parser.parse_args()
    worker = make_worker(
        options.folder,
        options.num_ids,
        seed=options.seed,
        delay=options.delay,
        lease_seconds=30.0,
    )
    worker.run()


if __name__ == "__main__":
    main()

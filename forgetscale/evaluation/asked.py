"""What was answered already: one line per document, kept until the evaluation is published.

A stopped or killed evaluation asks again only what no process has answered. Every process appends
to a file of its own; a line that a crash cut short is not a line, because its hash is missing.
"""

from __future__ import annotations

import json
import secrets
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forgetscale.artifact import canonical_json, hash_bytes
from forgetscale.errors import ForgetScaleError
from forgetscale.evaluation.collective import Collective, publish_on_rank_zero
from forgetscale.evaluation.plan import (
    PlannedBatch,
    cut_batches,
    gather_exactly_once,
    share_batches,
)


@dataclass(frozen=True, slots=True)
class Asked:
    """Something to be answered, with the name it is counted by.

    Attributes:
        key: Unique in a task, such as the id of its document.
        arguments: Hash of what is asked.
    """

    key: str
    arguments: str


def _line(value: Mapping[str, Any]) -> str:
    digest = hash_bytes(canonical_json(value))[:16]
    return json.dumps({"hash": digest, **value}, ensure_ascii=False) + "\n"


def _read_line(line: str) -> dict[str, Any] | None:
    """Return the value of a whole line, None for a piece of one."""
    try:
        value = json.loads(line)
    except ValueError:
        return None
    if not isinstance(value, dict):
        return None
    digest = value.pop("hash", None)
    return value if digest == hash_bytes(canonical_json(value))[:16] else None


class RequestLog:
    """Answers by key, in a folder that all processes of an evaluation share.

    Args:
        directory: Folder; made by rank 0.
        collective: The processes that evaluate together.

    Collective: every rank must make it at the same place.
    """

    def __init__(self, directory: Path, collective: Collective) -> None:
        publish_on_rank_zero(collective, lambda: directory.mkdir(parents=True, exist_ok=True))
        found: dict[str, dict[str, Any]] = {}
        if collective.rank == 0:
            for path in sorted(directory.glob("*.jsonl")):
                for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                    value = _read_line(line)
                    if value is not None:
                        found[value["key"]] = value
        # What rank 0 sees is what counts: all ranks must plan the same calls.
        self._known: dict[str, dict[str, Any]] = collective.gather_objects(found)[0]
        start = collective.gather_objects(secrets.token_hex(4))[0]
        self._path = directory / f"{start}-rank-{collective.rank:05d}.jsonl"

    def __len__(self) -> int:
        """Number of answers that were there at the start."""
        return len(self._known)

    def find(self, key: str, arguments: str) -> Any:
        """Return the answer kept for a request, or None.

        Args:
            key: Name of the request.
            arguments: Hash of what was asked; an answer to something else does not count.
        """
        value = self._known.get(key)
        return value["answer"] if value is not None and value["arguments"] == arguments else None

    def keep(self, answers: Mapping[str, tuple[str, Any]]) -> None:
        """Append ``key -> (arguments, answer)`` of this rank; a later kill does not lose it."""
        lines = [
            _line({"key": key, "arguments": arguments, "answer": answer})
            for key, (arguments, answer) in answers.items()
        ]
        with self._path.open("a", encoding="utf-8") as file:
            file.write("".join(lines))


class NothingKept:
    """Stands in for a ``RequestLog`` where nothing is worth keeping, such as on a live model."""

    def __len__(self) -> int:
        """Return 0."""
        return 0

    def find(self, key: str, arguments: str) -> Any:
        """Return None."""

    def keep(self, answers: Mapping[str, tuple[str, Any]]) -> None:
        """Do nothing."""


Log = RequestLog | NothingKept


def answer_each_once(
    asked: Sequence[Asked],
    lengths: Sequence[int],
    answer: Callable[[PlannedBatch], Sequence[Any]],
    *,
    collective: Collective,
    batch_size: int,
    log: Log,
    on_call: Callable[[], None],
) -> dict[str, Any]:
    """Answer everything over all ranks, each thing exactly once; return all answers on all ranks.

    Collective: every rank must call it with the same things.

    Batches are cut over everything, then those that an earlier start answered are left out: what
    shares a batch does not depend on where a start was stopped, nor on the number of ranks.

    Args:
        asked: What is asked, each with a key of its own.
        lengths: Tokens of each; similar ones share a batch.
        answer: Answers a batch, in order, as JSON keeps them. Called equally often on every rank;
            what it returns for a dummy is dropped.
        collective: The processes that evaluate together.
        batch_size: Most of a batch, >= 1.
        log: What was answered before.
        on_call: Called on every rank after each batch, equally often; may raise on all.

    Raises:
        ForgetScaleError: A key stands twice, or something came back twice or not at all.
    """
    kept = {item.key: log.find(item.key, item.arguments) for item in asked}
    if len(kept) != len(asked):
        twice = Counter(item.key for item in asked).most_common(1)[0][0]
        raise ForgetScaleError(f"evaluation: {twice!r} is asked twice; expected each key once.")
    open_batches = [
        batch
        for batch in cut_batches(lengths, batch_size)
        if any(kept[asked[item].key] is None for item in batch.items)
    ]
    local: dict[str, Any] = {}
    for batch in share_batches(
        open_batches, rank=collective.rank, world_size=collective.world_size
    ):
        found = answer(batch)
        if not batch.dummy:
            named = [asked[item] for item in batch.items]
            new = dict(zip((item.key for item in named), found, strict=True))
            log.keep({item.key: (item.arguments, new[item.key]) for item in named})
            local |= new
        on_call()
    opened = {asked[item].key for batch in open_batches for item in batch.items}
    made = gather_exactly_once(collective, local, sorted(opened))
    return {item.key: made.get(item.key, kept[item.key]) for item in asked}

"""What was answered already: one line per document, kept until the evaluation is published.

A stopped or killed evaluation asks again only what no process has answered. Every process appends
to a file of its own; a line that a crash cut short is not a line, because its hash is missing.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from forgetscale.artifact import canonical_json, hash_bytes
from forgetscale.evaluation.collective import Collective, publish_on_rank_zero


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
        """Append ``key -> (arguments, answer)`` of this rank; on the disk before it returns."""
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

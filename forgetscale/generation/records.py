"""What is kept of a sample, and its form as an Arrow row.

A row holds nothing of where or when it was made: no worker, host or time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

ACCEPTED, REJECTED, FAILED = "accepted", "rejected", "failed"
STATES = (ACCEPTED, REJECTED, FAILED)


@dataclass(frozen=True, slots=True)
class Turn:
    """A turn of a sample, in tokens.

    Attributes:
        role: Who wrote it.
        start: Its first token.
        end: Behind its last token, the end-of-turn token included where it was generated.
        finish_reason: ``stop``, ``length`` (cut) or ``given`` (not generated).
    """

    role: str
    start: int
    end: int
    finish_reason: str


@dataclass(slots=True)
class Sample:
    """A finished sample.

    Attributes:
        sample_id: Its number, >= 0.
        attempt: Try that it comes from, first = 0.
        state: One of ``STATES``.
        reason: Why it is not accepted, or "".
        source_id: Id of the prompt or row it was made from, or "".
        messages: The conversation.
        input_ids: Its tokens as generated.
        supervised: Begin and end of the token ranges to learn from.
        turns: Its turns.
        log_probs: Log-probability of each token under the model at temperature 1, in nats; None
            where the token was not generated here.
        seeds: Seed of each generated turn.
        top_ids: Most probable tokens at each supervised position, one position after another.
        top_log_probs: Their log-probabilities.
    """

    sample_id: int
    attempt: int = 0
    state: str = ACCEPTED
    reason: str = ""
    source_id: str = ""
    messages: list[dict[str, str]] = field(default_factory=list)
    input_ids: list[int] = field(default_factory=list)
    supervised: list[tuple[int, int]] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    log_probs: list[float | None] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    top_ids: list[int] = field(default_factory=list)
    top_log_probs: list[float] = field(default_factory=list)

    @property
    def num_generated_tokens(self) -> int:
        """Tokens that the model wrote."""
        return sum(value is not None for value in self.log_probs)


_TEXTS = [("role", pa.string()), ("content", pa.string())]
_RANGE = [("start", pa.int32()), ("end", pa.int32())]
_TURN = [
    ("role", pa.string()),
    ("start", pa.int32()),
    ("end", pa.int32()),
    ("finish_reason", pa.string()),
]
FIELDS = [
    ("sample_id", pa.int64()),
    ("attempt", pa.int32()),
    ("state", pa.string()),
    ("reason", pa.string()),
    ("source_id", pa.string()),
    ("messages", pa.list_(pa.struct(_TEXTS))),
    ("input_ids", pa.list_(pa.int32())),
    ("supervised", pa.list_(pa.struct(_RANGE))),
    ("turns", pa.list_(pa.struct(_TURN))),
    ("log_probs", pa.list_(pa.float32())),
    ("seeds", pa.list_(pa.int64())),
    ("top_ids", pa.list_(pa.int32())),
    ("top_log_probs", pa.list_(pa.float32())),
]


def row_schema(run_key: str) -> pa.Schema:
    """Return the schema of rows; the key of the run stands in its metadata."""
    return pa.schema(FIELDS, metadata={"run_key": run_key})


def to_table(samples: Iterable[Sample], schema: pa.Schema) -> pa.Table:
    """Return samples as a table, in the given order."""
    rows = [
        {
            **{name: getattr(sample, name) for name, _ in FIELDS},
            "supervised": [{"start": start, "end": end} for start, end in sample.supervised],
            "turns": [{name: getattr(turn, name) for name, _ in _TURN} for turn in sample.turns],
        }
        for sample in samples
    ]
    return pa.Table.from_pylist(rows, schema=schema)


def from_rows(rows: Sequence[dict[str, Any]]) -> list[Sample]:
    """Return the samples of rows as Arrow gives them."""
    return [
        Sample(
            **{
                **row,
                "supervised": [(item["start"], item["end"]) for item in row["supervised"]],
                "turns": [Turn(**item) for item in row["turns"]],
            }
        )
        for row in rows
    ]

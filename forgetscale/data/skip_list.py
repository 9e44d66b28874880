"""Rows that are never trained on again: a lasting list with exact resume.

A skipped row keeps its place in the order and loses its targets. So global batches stay the same
rows, the cursor stays one integer, and a longer list can neither lose nor repeat another row.

Each entry holds from a position of the stream on. What stands before it was trained on and is left
as it was, so that a run which falls back to an older checkpoint repeats its past exactly.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64

from forgetscale.artifact import fsync_path
from forgetscale.data.training_data import TrainingData
from forgetscale.errors import DataError

SKIP_LIST_FILE = "skip_list.jsonl"
_FIELDS = {"set": str, "row": int, "reason": str, "step": int, "first_position": int}


@dataclass(frozen=True, slots=True)
class SkippedRow:
    """One entry of a skip list."""

    set: str
    """Content hash of the token set."""
    row: int
    """Row number in the set."""
    reason: str
    """Why, for people."""
    step: int
    """Optimizer steps done when it was put on the list."""
    first_position: int
    """It holds from this position of the stream on (a cursor, rows of all ranks)."""


class SkipList:
    """Which positions of the stream carry no targets.

    Args:
        data: The training data.
        entries: Rows to skip; for a row named twice the earliest position counts.

    Raises:
        DataError: An entry names a row the data do not hold, or nothing would be left to train on.
    """

    def __init__(self, data: TrainingData, entries: Iterable[SkippedRow] = ()) -> None:
        self.entries = tuple(entries)
        self._data = data
        counts = [part.token_set.num_rows for part in data.parts]
        self._first_key = np.concatenate([[0], np.cumsum(counts[:-1])]).astype(np.int64)
        earliest: dict[int, int] = {}
        for entry in self.entries:
            for key in self._keys(entry):
                earliest[key] = min(entry.first_position, earliest.get(key, entry.first_position))
        if len(earliest) >= data.num_rows:
            raise DataError(
                f"the skip list names all {data.num_rows} rows of the training data; nothing is"
                " left to train on, shorten the list or use other data."
            )
        self._rows = np.array(sorted(earliest), dtype=np.int64)
        self._from = np.array([earliest[key] for key in sorted(earliest)], dtype=np.int64)

    def __len__(self) -> int:
        """Return the number of rows on the list."""
        return len(self._rows)

    def holds(self, entry: SkippedRow) -> bool:
        """Return whether the list names the entry's row already."""
        return bool(np.isin(self._keys(entry), self._rows).all())

    def with_entries(self, entries: Iterable[SkippedRow]) -> SkipList:
        """Return this list with more entries."""
        return SkipList(self._data, (*self.entries, *entries))

    def skipped(
        self, first: int, set_ids: Int64[np.ndarray, " n"], rows: Int64[np.ndarray, " n"]
    ) -> Bool[np.ndarray, " n"]:
        """Return which of the rows at global positions ``first`` and on are skipped."""
        if not len(self._rows):
            return np.zeros(len(rows), dtype=bool)
        keys = self._first_key[set_ids] + rows
        at = np.minimum(np.searchsorted(self._rows, keys), len(self._rows) - 1)
        positions = np.arange(first, first + len(rows))
        found: np.ndarray = (self._rows[at] == keys) & (self._from[at] <= positions)
        return found

    def _keys(self, entry: SkippedRow) -> list[int]:
        keys = []
        for index, part in enumerate(self._data.parts):
            if part.token_set.content_hash != entry.set:
                continue
            if not 0 <= entry.row < part.token_set.num_rows:
                raise DataError(
                    f"the skip list names row {entry.row} of {part.token_set.path}, which has rows"
                    f" 0 to {part.token_set.num_rows - 1}; correct the list."
                )
            keys.append(int(self._first_key[index]) + entry.row)
        if not keys:
            names = ", ".join(
                f"{part.token_set.path} has {part.token_set.content_hash[:12]}"
                for part in self._data.parts
            )
            raise DataError(
                f"the skip list names row {entry.row} of a set with content hash"
                f" {entry.set[:12]}, which is not part of the training data ({names}); correct"
                " the list."
            )
        return keys


def read_skips(
    path: Path, *, only_set: str | None = None, step: int = 0, first_position: int = 0
) -> list[SkippedRow]:
    """Read a skip list: one JSON object a line; ``row`` must stand in each.

    Args:
        path: JSON lines file.
        only_set: Content hash for lines that name no ``set``; None: each must name it.
        step: Step for lines that name none.
        first_position: Position for lines that name none.

    Raises:
        DataError: The file is missing, or a line is not an entry.
    """
    if not path.is_file():
        raise DataError(f"{path} is not a file; expected a skip list, one JSON object a line.")
    neutral: dict[str, Any] = {
        "set": only_set,
        "reason": "",
        "step": step,
        "first_position": first_position,
    }
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}:{number} is not valid JSON ({error}).") from error
        if not isinstance(value, dict):
            raise DataError(f'{path}:{number} is not an object such as {{"row": 17}}.')
        fields = neutral | value
        for name, kind in _FIELDS.items():
            if type(fields.get(name)) is not kind:
                raise DataError(
                    f"{path}:{number}: {name} is {fields.get(name)!r}, expected"
                    f" {'text' if kind is str else 'a whole number'}"
                    + ("; with several sets each line names its own." if name == "set" else ".")
                )
        if unknown := sorted(set(value) - set(_FIELDS)):
            raise DataError(
                f"{path}:{number}: {unknown[0]} is not a field of a skip list, which has"
                f" {', '.join(_FIELDS)}."
            )
        found.append(SkippedRow(**fields))
    return found


def append_skips(path: Path, entries: Sequence[SkippedRow]) -> None:
    """Add entries to the end of a skip list; a reader sees the old file or the whole new one.

    Call on one process only.
    """
    before = path.read_text(encoding="utf-8") if path.is_file() else ""
    temporary = path.with_name(f".{path.name}.tmp-{secrets.token_hex(4)}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(before)
            file.writelines(json.dumps(asdict(entry)) + "\n" for entry in entries)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_path(path.parent)


def settle_skips(
    data: TrainingData, run_folder: Path, given: Path | None, *, step: int, cursor: int
) -> SkipList:
    """Return the run's skip list, after adding what the recipe's file names beyond it.

    New rows hold from the cursor on: a row that was trained on before stays as it was. At the
    start of a run the cursor is 0, so they hold for the whole run. Call on one process only.

    Args:
        data: The training data.
        run_folder: Holds ``skip_list.jsonl``, the lasting list.
        given: ``data.skip_rows``, or None.
        step: Optimizer steps done.
        cursor: Rows consumed by all ranks.

    Raises:
        DataError: A list cannot be read or does not fit the data.
    """
    ledger = run_folder / SKIP_LIST_FILE
    skips = SkipList(data, read_skips(ledger) if ledger.is_file() else ())
    if given is None:
        return skips
    only = data.parts[0].token_set.content_hash if len(data.parts) == 1 else None
    wanted = read_skips(given, only_set=only, step=step, first_position=cursor)
    new = [entry for entry in wanted if not skips.holds(entry)]
    if not new:
        return skips
    longer = skips.with_entries(new)
    append_skips(ledger, new)
    return longer

"""Units of work and their results as small files.

A unit is some consecutive lines of one file, about ``UNIT_BYTES`` of text, or a part of one very
long document. Its result is a pure function of the lines and the settings; results are kept under
a name that says which input and settings they belong to, so that an interrupted build goes on from
them. A result that was cut short or changed on disk is recognised by its hash and made again.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from safetensors import SafetensorError
from safetensors.numpy import load, save

from data_prep.readers import Line

UNIT_BYTES = 1 << 20
PIECE_CHARACTERS = 1 << 20
_DIGEST_BYTES = 16


@dataclass(frozen=True, slots=True)
class Part:
    """Place of a unit inside a long document, and what was found in the whole of it.

    Attributes:
        index: First part = 0.
        count: Parts of the document.
        text_hash: ``text_hash`` of the whole text, in hexadecimal.
        escapes: Escapes undone in the whole text.
    """

    index: int
    count: int
    text_hash: str
    escapes: dict[str, int]


@dataclass(frozen=True, slots=True)
class Unit:
    """Some lines of one file: the piece of work handed to a worker.

    Attributes:
        number: Position in the file, first = 0.
        lines: The lines; those of a part are pieces of text.
        plain_text: Whether lines are text themselves and not JSON objects.
        stored_bytes: Bytes of the stored file this unit stands for, for progress.
        part: Set where the unit is part of a long document.
    """

    number: int
    lines: list[Line]
    plain_text: bool = False
    stored_bytes: int = 0
    part: Part | None = None

    def to_bytes(self) -> bytes:
        """Return the unit as bytes, to hand it to another process through a file."""
        header = {
            "number": self.number,
            "plain_text": self.plain_text,
            "stored_bytes": self.stored_bytes,
            "part": None
            if self.part is None
            else [self.part.index, self.part.count, self.part.text_hash, self.part.escapes],
            "lines": [[line.number, len(line.data), line.reject] for line in self.lines],
        }
        return b"\n".join([json.dumps(header).encode(), b"".join(line.data for line in self.lines)])

    @classmethod
    def from_bytes(cls, data: bytes) -> Unit:
        """Return the unit written by ``to_bytes``."""
        head, _, body = data.partition(b"\n")
        header = json.loads(head)
        lines, start = [], 0
        for number, size, reject in header["lines"]:
            lines.append(Line(number, body[start : start + size], reject))
            start += size
        part = None if header["part"] is None else Part(*header["part"])
        return cls(header["number"], lines, header["plain_text"], header["stored_bytes"], part)


@dataclass(slots=True)
class UnitResult:
    """What was found in a unit.

    Attributes:
        arrays: Per document or per token, see the maker.
        rejects: Line number and reason of each line that is no document.
        escapes: Escapes undone, by kind.
        counts: Documents by property.
        dropped: Documents left out, by reason.
        num_lines: Lines of the unit; 0 for later parts of a document.
        stored_bytes: As in the unit.
        part: ``(index, count)`` of a part of a document, or None.
    """

    arrays: dict[str, np.ndarray]
    rejects: list[tuple[int, str]] = field(default_factory=list)
    escapes: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    num_lines: int = 0
    stored_bytes: int = 0
    part: tuple[int, int] | None = None


_FIELDS = ("rejects", "escapes", "counts", "dropped", "num_lines", "stored_bytes", "part")


def save_result(path: Path, result: UnitResult, token: str) -> None:
    """Write a result so that readers see nothing or all of it.

    Args:
        path: Final name.
        result: The result.
        token: Part of the temporary name that no other process uses.
    """
    info = {name: getattr(result, name) for name in _FIELDS}
    arrays = {name: np.ascontiguousarray(array) for name, array in result.arrays.items()}
    data = save(arrays, metadata={"info": json.dumps(info, ensure_ascii=False)})
    temporary = path.with_name(f"{path.name}.{token}")
    with temporary.open("wb") as file:
        file.write(xxhash.xxh3_64_hexdigest(data).encode())
        file.write(data)
    os.replace(temporary, path)


def load_result(path: Path) -> UnitResult | None:
    """Return the result at ``path``, or None if it is missing or damaged."""
    try:
        stored = path.read_bytes()
    except FileNotFoundError:
        return None
    data = stored[_DIGEST_BYTES:]
    if stored[:_DIGEST_BYTES] != xxhash.xxh3_64_hexdigest(data).encode():
        return None
    try:
        arrays = load(data)
        info: dict[str, Any] = json.loads(_metadata(data)["info"])
    except (SafetensorError, ValueError, KeyError):
        return None
    return UnitResult(
        arrays,
        rejects=[(line, reason) for line, reason in info["rejects"]],
        escapes=Counter(info["escapes"]),
        counts=Counter(info["counts"]),
        dropped=Counter(info["dropped"]),
        num_lines=info["num_lines"],
        stored_bytes=info["stored_bytes"],
        part=None if info["part"] is None else (info["part"][0], info["part"][1]),
    )


def _metadata(data: bytes) -> dict[str, str]:
    size = int.from_bytes(data[:8], "little")
    found: dict[str, str] = json.loads(data[8 : 8 + size])["__metadata__"]
    return found


def cut_text(text: str, limit: int = PIECE_CHARACTERS) -> Iterator[str]:
    """Yield pieces of at most ``limit`` characters that are tokenised one by one.

    Cuts are made after the last line break of the second half of a piece, else before its last
    space, else at the limit: a pure function of the text.
    """
    start = 0
    while len(text) - start > limit:
        end = text.rfind("\n", start + limit // 2, start + limit) + 1
        if end == 0:
            end = text.rfind(" ", start + max(limit // 2, 1), start + limit)
        if end <= 0:
            end = start + limit
        yield text[start:end]
        start = end
    yield text[start:]

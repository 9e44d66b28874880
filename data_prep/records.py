r"""From a line of input to a document, or to the reason why it is none.

MADLAD-400 stores line breaks inside ``text`` as the two characters backslash and n. One
left-to-right pass over a closed list undoes this: ``\n``, ``\t``, ``\r`` and ``\\``; any other
backslash stays as it is. So backslash, backslash, n (an escaped backslash before the letter n)
becomes backslash, n and not a line break.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ESCAPES = {r"\n": "\n", r"\t": "\t", r"\r": "\r", r"\\": "\\"}
_ESCAPE = re.compile(r"\\[ntr\\]")


@dataclass(frozen=True, slots=True)
class Document:
    """What one line holds: plain text, or a conversation to be rendered."""

    text: str = ""
    messages: tuple[dict[str, str], ...] = ()


class BadRecordError(Exception):
    """A line that is no document; the message is the reason written to the rejects file."""


def undo_escapes(text: str) -> tuple[str, Counter[str]]:
    """Return ``text`` with the escapes of the closed list undone, and how many of each kind."""
    counts: Counter[str] = Counter()
    if "\\" not in text:
        return text, counts
    counts.update(_ESCAPE.findall(text))
    return _ESCAPE.sub(lambda match: ESCAPES[match[0]], text), counts


def parse_record(data: bytes, *, chat: bool) -> Document:
    """Return the document of one line.

    Args:
        data: The line as stored.
        chat: Take ``messages`` where a row has them; else only ``text`` counts.

    Raises:
        BadRecordError: The line is not UTF-8, not a JSON object, or has no usable field.
    """
    try:
        record = json.loads(data.decode("utf-8").removeprefix("\ufeff"))
    except UnicodeDecodeError as error:
        raise BadRecordError(f"not UTF-8 (byte {error.start + 1} of the line)") from error
    except (ValueError, RecursionError) as error:
        raise BadRecordError(f"not JSON ({error})") from error
    if not isinstance(record, Mapping):
        raise BadRecordError(f"not a JSON object but {type(record).__name__}")
    if chat and "messages" in record:
        return Document(messages=_messages(record["messages"]))
    if "text" not in record:
        wanted = "neither 'messages' nor 'text'" if chat else "no field 'text'"
        raise BadRecordError(wanted)
    if not isinstance(record["text"], str):
        raise BadRecordError(f"'text' is not a string but {type(record['text']).__name__}")
    return Document(text=_require_unicode(record["text"]))


def _messages(value: Any) -> tuple[dict[str, str], ...]:
    if not isinstance(value, list) or not value:
        raise BadRecordError("'messages' is not a list of at least one message")
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict):
            raise BadRecordError(f"message {number} is not a JSON object")
        for field in ("role", "content"):
            if not isinstance(message.get(field), str):
                raise BadRecordError(f"message {number} has no string '{field}'")
            _require_unicode(message[field])
    return tuple(value)


def _require_unicode(text: str) -> str:
    """Return ``text`` if it can be written as UTF-8 (JSON can hold half of a surrogate pair)."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRecordError("holds half of a surrogate pair, which is no character") from error
    return text

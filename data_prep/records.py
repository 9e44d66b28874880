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
    first_supervised: int = 0
    """Assistant messages before this one are context only; for supervised fine-tuning."""
    num_open_turns: int = 0
    """Messages after the last answer that were left out; for supervised fine-tuning."""
    tokens: tuple[int, ...] = ()
    """Tokens of the conversation, where it was generated: rows hold these and no others."""
    supervised: tuple[tuple[int, int], ...] = ()
    """Begin and end of the answers among ``tokens``."""
    tokenizer_sha256: str = ""
    """Tokenizer of ``tokens``."""
    left_out: str = ""
    """Why it is left out on purpose, or ""."""


class BadRecordError(Exception):
    """A line that is no document; the message is the reason written to the rejects file."""


def undo_escapes(text: str) -> tuple[str, Counter[str]]:
    """Return ``text`` with the escapes of the closed list undone, and how many of each kind."""
    counts: Counter[str] = Counter()
    if "\\" not in text:
        return text, counts
    counts.update(_ESCAPE.findall(text))
    return _ESCAPE.sub(lambda match: ESCAPES[match[0]], text), counts


def parse_text(data: bytes) -> Document:
    """Return the document of plain text.

    Raises:
        BadRecordError: It is not UTF-8 or holds a NUL character.
    """
    return Document(text=require_characters(_decode(data).removesuffix("\r")))


def parse_object(data: bytes) -> Mapping[str, Any]:
    """Return the JSON object of a line.

    Raises:
        BadRecordError: The line is not UTF-8 or not a JSON object.
    """
    try:
        record = json.loads(_decode(data))
    except (ValueError, RecursionError) as error:
        raise BadRecordError(f"not JSON ({error})") from error
    if not isinstance(record, Mapping):
        raise BadRecordError(f"not a JSON object but {type(record).__name__}")
    return record


def parse_record(data: bytes, *, chat: bool, field: str = "text") -> Document:
    """Return the document of one line of JSON.

    Args:
        data: The line as stored.
        chat: Take ``messages`` where a row has them; else only ``field`` counts.
        field: Name of the field that holds the text.

    Raises:
        BadRecordError: The line is not UTF-8, not a JSON object, has no usable field, or holds a
            NUL character.
    """
    record = parse_object(data)
    if chat and "messages" in record:
        return Document(messages=_messages(record["messages"]))
    if field not in record:
        raise BadRecordError(f"neither 'messages' nor '{field}'" if chat else f"no field '{field}'")
    if not isinstance(record[field], str):
        raise BadRecordError(f"'{field}' is not a string but {type(record[field]).__name__}")
    return Document(text=require_characters(record[field]))


def _decode(data: bytes) -> str:
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise BadRecordError(f"not UTF-8 (byte {error.start + 1} of the line)") from error


def _messages(value: Any) -> tuple[dict[str, str], ...]:
    if not isinstance(value, list) or not value:
        raise BadRecordError("'messages' is not a list of at least one message")
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict):
            raise BadRecordError(f"message {number} is not a JSON object")
        for field in ("role", "content"):
            if not isinstance(message.get(field), str):
                raise BadRecordError(f"message {number} has no string '{field}'")
            require_characters(message[field])
    return tuple(value)


def require_characters(text: str) -> str:
    """Return ``text`` if it is made of characters: no half surrogate pair (JSON can), no NUL.

    Raises:
        BadRecordError: It is not.
    """
    if (place := text.find("\0")) >= 0:
        raise BadRecordError(f"holds a NUL character (character {place + 1} of the text)")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRecordError("holds half of a surrogate pair, which is no character") from error
    return text

"""Rows of the common chat formats to conversations for supervised fine-tuning.

| format | row |
|---|---|
| ``messages`` | ``{"messages": [{"role": "user", "content": "..."}, ...]}`` |
| ``sharegpt`` | ``{"conversations": [{"from": "human", "value": "..."}, ...], "system": "..."}`` |
| ``alpaca`` | ``{"instruction": "...", "input": "...", "output": "..."}`` |
| ``prompt-completion`` | ``{"prompt": "...", "completion": "..."}``, both text or both messages |
| ``dialogues`` | what ``forgetscale generate`` writes: messages and their tokens, taken as is |

``auto`` takes the first format, in this order, whose fields a row has; messages under the key
``conversations`` and the other way round are told apart by their own keys. In Alpaca rows a blank
line stands between instruction and input; ``system`` and ``history`` (pairs of texts) come before.
Of a prompt of messages no turn is supervised, only the completion is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from data_prep.records import BadRecordError, Document, parse_object, require_characters

FORMATS = ("auto", "dialogues", "messages", "sharegpt", "alpaca", "prompt-completion")
COLUMNS = (
    "messages",
    "conversations",
    "instruction",
    "input",
    "output",
    "prompt",
    "completion",
    "system",
    "history",
    "tools",
    "input_ids",
    "supervised",
    "tokenizer_sha256",
    "state",
    "reason",
)
"""Table columns that a conversation may need."""
_NEEDED = {
    "dialogues": ("messages", "input_ids", "supervised", "tokenizer_sha256"),
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt-completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
}
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
"""What ShareGPT calls roles."""


def parse_conversation(data: bytes, format_name: str = "auto") -> Document:
    """Return the conversation of one line of JSON.

    Args:
        data: The line as stored.
        format_name: One of ``FORMATS``.

    Returns:
        A document with ``messages`` that end with an answer, at or after ``first_supervised``;
        turns after the last answer, from which nobody learns, are left out and counted.

    Raises:
        BadRecordError: The line is no row of that format, has no assistant turn that could be
            learnt, or uses tools.
    """
    record = parse_object(data)
    kind = _format_of(record) if format_name == "auto" else format_name
    missing = [name for name in _NEEDED[kind] if record.get(name) is None]
    if missing:
        raise BadRecordError(f"no '{missing[0]}', which rows of the format {kind} have")
    if record.get("tools"):
        raise BadRecordError("has 'tools', which are not supported")
    first = 0
    if kind == "dialogues":
        return _dialogue(record)
    if kind == "messages":
        messages = _turns(record["messages"], "messages")
    elif kind == "sharegpt":
        messages = [*_system(record), *_turns(record["conversations"], "conversations")]
    elif kind == "alpaca":
        messages = _alpaca(record)
    else:
        messages, first = _prompt_and_completion(record)
    answers = [n for n, turn in enumerate(messages) if turn["role"] == "assistant" and n >= first]
    if not answers:
        raise BadRecordError("has no assistant turn, so nothing could be learnt")
    num_open = len(messages) - 1 - answers[-1]
    messages = messages[: answers[-1] + 1]
    for number, turn in enumerate(messages, start=1):
        if turn["role"] == "assistant" and not turn["content"].strip():
            raise BadRecordError(f"assistant message {number} is empty")
    return Document(messages=tuple(messages), first_supervised=first, num_open_turns=num_open)


def _dialogue(record: Mapping[str, Any]) -> Document:
    """Return a generated dialogue with its tokens; one that was rejected is left out."""
    messages = tuple(_turns(record["messages"] or [{"role": "user", "content": ""}], "messages"))
    if record.get("state", "accepted") != "accepted":
        return Document(messages=messages, left_out="not_accepted")
    ids: list[Any] = record["input_ids"]
    places: list[tuple[Any, Any]] = [
        (item.get("start"), item.get("end"))
        for item in record["supervised"]
        if isinstance(item, Mapping)
    ]
    borders = [border for place in places for border in place]
    if (
        not all(isinstance(item, int) and item >= 0 for item in [*ids, *borders])
        or borders != sorted(borders)
        or not places
        or borders[0] < 1
        or borders[-1] > len(ids)
    ):
        raise BadRecordError("'supervised' is no list of ranges inside 'input_ids'")
    return Document(
        messages=messages,
        tokens=tuple(ids),
        supervised=tuple(places),
        tokenizer_sha256=str(record["tokenizer_sha256"]),
    )


def _format_of(record: Mapping[str, Any]) -> str:
    for kind, fields in _NEEDED.items():
        if all(record.get(name) is not None for name in fields):
            return kind
    raise BadRecordError(
        "no conversation: neither 'messages', nor 'conversations', nor 'prompt' and 'completion',"
        " nor 'instruction' and 'output'"
    )


def _turns(value: Any, name: str) -> list[dict[str, str]]:
    """Return turns written as role and content, or as from and value."""
    if not isinstance(value, list) or not value:
        raise BadRecordError(f"'{name}' is not a list of at least one message")
    return [_turn(turn, number) for number, turn in enumerate(value, start=1)]


def _turn(turn: Any, number: int) -> dict[str, str]:
    if not isinstance(turn, dict):
        raise BadRecordError(f"message {number} is not a JSON object")
    if turn.get("tool_calls") or turn.get("function_call"):
        raise BadRecordError(f"message {number} calls a tool, which is not supported")
    role_field, text_field = ("role", "content") if "role" in turn else ("from", "value")
    role = turn.get(role_field)
    if not isinstance(role, str):
        raise BadRecordError(f"message {number} has no string '{role_field}'")
    if role_field == "from":
        if role.lower() not in _ROLES:
            raise BadRecordError(f"message {number} is from '{role}', an unknown speaker")
        role = _ROLES[role.lower()]
    return {"role": role, "content": _text(turn, text_field, f"message {number}")}


def _text(holder: Mapping[str, Any], field: str, where: str) -> str:
    value = holder.get(field)
    if not isinstance(value, str):
        raise BadRecordError(f"{where} has no string '{field}'")
    return require_characters(value)


def _system(record: Mapping[str, Any]) -> list[dict[str, str]]:
    if not record.get("system"):
        return []
    return [{"role": "system", "content": _text(record, "system", "the row")}]


def _pair(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _alpaca(record: Mapping[str, Any]) -> list[dict[str, str]]:
    messages = _system(record)
    history = record.get("history") or []
    if not isinstance(history, list):
        raise BadRecordError("'history' is not a list of pairs of texts")
    for pair in history:
        if not _is_pair(pair):
            raise BadRecordError("'history' is not a list of pairs of texts")
        messages += _pair(*(require_characters(text) for text in pair))
    question = _text(record, "instruction", "the row")
    if record.get("input"):
        question = f"{question}\n\n{_text(record, 'input', 'the row')}"
    return messages + _pair(question, _text(record, "output", "the row"))


def _is_pair(value: Any) -> bool:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and len(value) == 2
        and all(isinstance(text, str) for text in value)
    )


def _prompt_and_completion(record: Mapping[str, Any]) -> tuple[list[dict[str, str]], int]:
    """Return the messages and the number of the first one that may be supervised."""
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        question, answer = (_text(record, name, "the row") for name in ("prompt", "completion"))
        return _system(record) + _pair(question, answer), 0
    if isinstance(prompt, str) or isinstance(completion, str):
        raise BadRecordError("of 'prompt' and 'completion' one is text and the other is not")
    before = _turns(prompt, "prompt")
    return before + _turns(completion, "completion"), len(before)

"""Which characters of a rendered chat are the assistant's, for any chat template.

Templates carry no reliable marks, so the text itself is asked. The whole conversation is rendered
once; that text is what gets tokenised. For each assistant message:

1. *Beginning.* The conversation before it is rendered with the generation prompt. Where the whole
   text begins with that, the answer begins there: the model is asked to go on from this very text.
   Where it does not, as when a template moves the system text, the ends of the two texts tell
   whether white space before the answer belongs to it.
2. *Content.* Where the message (as it stands, or without the white space around it) does not follow
   literally, as when a template drops an earlier chain of thought, the conversation is rendered
   with the message replaced by a letter it does not hold: what the two texts do not share, at
   their beginning and their end, is the message as this template writes it.
3. *End of turn.* The conversation up to and with the message is rendered. What follows the message
   both there and in the whole text ends the turn, up to its first special token; without one, all
   of it.

Every step is verified on the text; a template that says something else than the messages is
refused with the number of the message.
"""

from __future__ import annotations

import os.path
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from jinja2 import TemplateError

from data_prep.records import BadRecordError

Messages = Sequence[dict[str, str]]
Render = Callable[..., str]
"""``render(messages, add_generation_prompt=False)``; raises ``TemplateError`` on refusal."""
_PROBES = "ЖΩ禅"


@dataclass(frozen=True, slots=True)
class Span:
    """An answer inside a rendered chat, in characters.

    Attributes:
        message: Number of the message, first = 0.
        start: Where the answer begins, right behind the generation prompt.
        end: Where it ends, with its end-of-turn marker.
        has_end: Whether an end-of-turn marker other than white space follows the content.
    """

    message: int
    start: int
    end: int
    has_end: bool


class SpanFinder:
    """Finds answers in chats of one template.

    Args:
        render: Renders messages.
        special_tokens: Texts of tokens that may end a turn.
    """

    def __init__(self, render: Render, special_tokens: Sequence[str]) -> None:
        self._render = render
        self._prompt = partial(render, add_generation_prompt=True)
        self._special = tuple(token for token in special_tokens if token.strip())

    def find(self, messages: Messages, first: int = 0) -> tuple[str, list[Span]]:
        """Return the rendered chat and its answers, in order.

        Args:
            messages: The conversation.
            first: Answers before this message are not looked for.

        Raises:
            BadRecordError: The template refuses the conversation, or writes a message in a form
                in which it cannot be recognised.
        """
        text = self._refusing(self._render, messages)
        spans: list[Span] = []
        for number, message in enumerate(messages):
            if number < first or message["role"] != "assistant":
                continue
            start, end = self._content(text, messages, number)
            marker = self._end_of_turn(text, end, messages, number)
            if spans and start < spans[-1].end:
                raise _unclear(number, "places it before the answer before it")
            spans.append(Span(number, start, end + len(marker), bool(marker.strip())))
        return text, spans

    def _refusing(self, render: Render, messages: Messages) -> str:
        try:
            return render(list(messages))
        except TemplateError as error:
            raise BadRecordError(f"refused by the chat template ({error})") from error

    def _opening(self, messages: Messages, number: int) -> str:
        """Return the conversation before an answer with the generation prompt, "" if refused."""
        if number == 0:
            return ""
        try:
            return self._prompt(list(messages[:number]))
        except TemplateError:
            return ""  # some templates need a user's message last, or more than a system message

    def _content(self, text: str, messages: Messages, number: int) -> tuple[int, int]:
        """Return where the answer begins and where its content ends."""
        opening = self._opening(messages, number)
        content = messages[number]["content"]
        is_prefix = bool(opening) and text.startswith(opening)
        if is_prefix:
            base = len(opening)
            if text.startswith(content, base):
                return base, base + len(content)
            core = content.strip()
            place = base + len(text[base:]) - len(text[base:].lstrip())
            if text.startswith(core, place):
                return base, place + len(core)
        start, end = self._by_probe(text, messages, number)
        if not is_prefix or start < len(opening):
            return start - _space_after(text[:start], opening), end
        if self._refusing(self._render, messages[:number]) == opening:
            return start, end  # there is no generation prompt; what stands between is a header
        return len(opening), end

    def _by_probe(self, text: str, messages: Messages, number: int) -> tuple[int, int]:
        """Return where the content stands, by rendering with another one in its place."""
        content = messages[number]["content"]
        other = self._refusing(self._render, _replaced(messages, number))
        start = len(os.path.commonprefix([text, other]))
        end = len(text) - min(_common_suffix(text, other), min(len(text), len(other)) - start)
        written = "".join(text[start:end].split())
        if not written:
            raise _unclear(number, "leaves it out")
        if written not in "".join(content.split()):
            raise _unclear(number, "writes it otherwise than it stands")
        return start, end

    def _end_of_turn(self, text: str, end: int, messages: Messages, number: int) -> str:
        """Return what ends the turn whose content ends at ``end``."""
        follows = text[end:]
        if number < len(messages) - 1:
            alone = self._refusing(self._render, messages[: number + 1])
            if text.startswith(alone):
                follows = text[end : len(alone)]
            else:
                shown = messages[: number + 1]
                other = self._refusing(self._render, _replaced(shown, number))
                tail = alone[len(alone) - _common_suffix(alone, other) :]
                follows = _shared_beginning(follows, tail)
        places = [(follows.find(token), -len(token)) for token in self._special]
        found = [place for place in places if place[0] >= 0]
        if not found:
            return follows
        place, size = min(found)
        return follows[: place - size]


def _space_after(before: str, opening: str) -> int:
    """Return how much white space at the end of ``before`` stands behind the generation prompt.

    ``before`` need not begin like ``opening``: a template may rewrite the beginning of a chat as
    the chat goes on. Their ends tell.
    """
    space = len(before) - len(before.rstrip())
    shared = [_common_suffix(before[: len(before) - size], opening) for size in range(space + 1)]
    return shared.index(max(shared))


def _shared_beginning(follows: str, tail: str) -> str:
    """Return the beginning of ``follows`` that is ``tail``'s too.

    White space before it may belong to the content in one and be stripped in the other.
    """
    bare = follows.lstrip()
    shared = os.path.commonprefix([bare, tail.lstrip()])
    if not shared:
        return os.path.commonprefix([follows, tail])
    return follows[: len(follows) - len(bare)] + shared


def _replaced(messages: Messages, number: int) -> list[dict[str, str]]:
    """Return the messages with a letter that is not in message ``number`` in its place."""
    content = messages[number]["content"]
    probe = next((letter for letter in _PROBES if letter not in content), None)
    if probe is None:
        raise _unclear(number, "cannot be asked about it (it holds all letters tried)")
    changed = list(messages)
    changed[number] = {**messages[number], "content": probe}
    return changed


def _common_suffix(one: str, other: str) -> int:
    return len(os.path.commonprefix([one[::-1], other[::-1]]))


def _unclear(number: int, what: str) -> BadRecordError:
    return BadRecordError(
        f"the chat template {what} (message {number + 1}, an answer), so its tokens are not known"
    )

"""What stands between the turns of a chat, in tokens, for any chat template.

A conversation of probes is rendered and tokenised by the template itself, several times with other
letters at the beginning and end of each probe. What stands between two probes is a gap: its tokens
are those that are there every time. Where a tokenizer merges the border of a gap with the text
beside it, such as the full stop and the line break before ``<|assistant|>`` or the space after
``[INST]``, those characters belong to no token of the gap; the model has to write them itself, as
it saw them written when it was trained, and the tokens of the whole are those of the template.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

from jinja2 import TemplateError

from forgetscale.data.template_day import asks_for_day, fix_day
from forgetscale.errors import ConfigError

_FIRST = ("a", "Z", "7", "(", "é", "-", "W", '"', "A", "T", "I", "H", "C", "D", "the", "S")
_LAST = ("a", "9", ".", "?", ")", '"', "!", "Z")
_BYTE = re.compile(r"^<0x[0-9A-F]{2}>$")
"""Pieces that stand for one byte of text; some tokenizers list them as special."""
_ROLES = ("user", "assistant")
Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True, slots=True)
class Gap:
    """What stands before, between or behind turns.

    Attributes:
        ids: Its tokens.
        before: Its first characters, which merge with the turn before it.
        after: Its last characters, which merge with the turn behind it.
        text: All its characters.
    """

    ids: tuple[int, ...]
    before: str
    after: str
    text: str


@dataclass(frozen=True, slots=True)
class TurnEnd:
    """How a turn ends and what follows it.

    Attributes:
        stop_id: Special token that ends it, or None.
        stop_text: Text that ends it where no token does, or "".
        forced: Tokens that follow the end, up to the next turn; with ``stop_text`` they begin with
            the tokens of that text.
        before: Characters that the turn has to end in, before the end.
        after: Characters that the next turn has to begin with.
    """

    stop_id: int | None
    stop_text: str
    forced: tuple[int, ...]
    before: str
    after: str


class ChatLayout:
    """The gaps of a chat template, and the checks that generated turns fit it.

    Args:
        tokenizer: Hugging Face tokenizer of its own: this object changes template and settings.
        turns: Pairs of turns of a conversation, > 0.
        system: System message in front, or None.
        day: ``YYYY-MM-DD`` that templates take for today.

    Raises:
        ConfigError: There is no chat template, it has no end-of-turn token after answers, or it
            writes conversations in a form that cannot be written turn by turn.
    """

    def __init__(
        self, tokenizer: Any, *, turns: int = 1, system: str | None = None, day: str
    ) -> None:
        self.tokenizer = tokenizer
        self.system = system
        name = getattr(tokenizer, "name_or_path", "")
        if not tokenizer.chat_template:
            raise ConfigError(
                f"the tokenizer {name} has no chat template, so nobody knows how a user's turn"
                " begins; use an instruct model, or add its template to the tokenizer."
            )
        if not getattr(tokenizer, "is_fast", False):
            raise ConfigError(
                f"the tokenizer {name} is written in Python and cannot say where its tokens stand"
                " in the text; convert it to a tokenizer.json."
            )
        self._name = name
        self.uses_day = asks_for_day(str(tokenizer.chat_template))
        if isinstance(tokenizer.chat_template, str):
            tokenizer.chat_template = fix_day(tokenizer.chat_template, date.fromisoformat(day))
        # It only shortens the offsets of tokens with white space: nothing is added to chats.
        tokenizer.backend_tokenizer.post_processor = None
        added = tokenizer.added_tokens_decoder
        self.special_ids = frozenset(
            {number for number, token in added.items() if token.special}
            | set(tokenizer.all_special_ids)
        ) - {number for number, token in added.items() if _BYTE.match(token.content)}
        self._special_texts = tuple(
            {added[number].content for number in self.special_ids if number in added}
        )
        self.gaps = self._find_gaps(turns)
        self.opening = self.gaps[0]
        self.ends = [self._turn_end(number) for number in range(2 * turns)]
        self.headers = self._headers()
        self._verify(turns)

    def encode(self, text: str) -> list[int]:
        """Return the ids of rendered text, nothing added."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, special tokens spelled out."""
        text: str = self.tokenizer.decode(
            list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text

    def render(self, messages: Messages, *, prompt: bool = False) -> str:
        """Return messages as the template writes them, with the generation prompt if asked.

        Raises:
            ConfigError: The template refuses them.
        """
        try:
            text: str = self.tokenizer.apply_chat_template(
                [dict(turn) for turn in messages], tokenize=False, add_generation_prompt=prompt
            )
        except TemplateError as error:
            raise ConfigError(
                f"the chat template of {self._name} refuses a conversation ({error}); leave the"
                " system message out, or change the roles."
            ) from error
        return text

    def prompt_ids(self, messages: Messages) -> list[int]:
        """Return the ids up to where an answer to ``messages`` begins."""
        return self.encode(self.render(messages, prompt=True))

    def answer_space(self, messages: Messages) -> str:
        """Return what an answer to ``messages`` has to begin with: a space in some templates."""
        text = self.render(messages, prompt=True)
        whole = self.render([*messages, {"role": "assistant", "content": "qzAzq"}])
        place = whole.find("qzAzq", len(text))
        return whole[len(text) : place] if whole.startswith(text) and place > 0 else ""

    def forges_tokens(self, text: str) -> bool:
        """Return whether ``text`` spells a special token or a role header."""
        return any(token in text for token in (*self._special_texts, *self.headers))

    def is_written_alike(self, messages: Messages, ids: Sequence[int]) -> bool:
        """Return whether the template writes ``messages`` as the text of ``ids``.

        What the template adds behind the last turn does not count.
        """
        try:
            rendered = self.encode(self.render(messages))
        except ConfigError:
            return False
        return rendered[: len(ids)] == list(ids) or self.decode(rendered).startswith(
            self.decode(ids)
        )

    def _probes(self, variant: int, turns: int) -> list[dict[str, str]]:
        messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        for number in range(2 * turns):
            first = _FIRST[(variant + 3 * number) % len(_FIRST)]
            last = _LAST[(variant + 5 * number) % len(_LAST)]
            content = f"{first}qz{number}zq{last}"
            messages.append({"role": _ROLES[number % 2], "content": content})
        return messages

    def _find_gaps(self, turns: int) -> list[Gap]:
        found = [self._gap_tokens(self._probes(n, turns)) for n in range(len(_FIRST))]
        gaps = []
        for number in range(2 * turns + 1):
            variants = [variant[number] for variant in found]
            texts = {text for text, _ in variants}
            common = _common_run([tokens for _, tokens in variants])
            if len(texts) != 1:
                raise ConfigError(
                    f"the chat template of {self._name} writes what stands between turns in"
                    " dependence on the turns, so dialogues cannot be written turn by turn."
                )
            gaps.append(_gap(texts.pop(), common, [tokens for _, tokens in variants]))
        return gaps

    def _gap_tokens(
        self, messages: list[dict[str, str]]
    ) -> list[tuple[str, list[tuple[int, int, int]]]]:
        """Return text and tokens (begin, end, id) of each gap; those that reach beyond it too."""
        text = self.render(messages)
        places, start = [], 0
        for turn in messages:
            if turn["role"] == "system":
                continue
            place = text.find(turn["content"], start)
            if place < 0:
                raise ConfigError(
                    f"the chat template of {self._name} does not write turns as they stand, or not"
                    " in their order, so dialogues cannot be written turn by turn."
                )
            start = place + len(turn["content"])
            places.append((place, start))
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        tokens = [
            (int(begin), int(end), int(number))
            for (begin, end), number in zip(
                encoded["offset_mapping"], encoded["input_ids"], strict=True
            )
        ]
        borders = [0, *(border for place in places for border in place), len(text)]
        gaps = []
        for begin, end in zip(borders[0::2], borders[1::2], strict=True):
            inside = [(b - begin, e - begin, n) for b, e, n in tokens if e > begin and b < end]
            gaps.append((text[begin:end], inside))
        return gaps

    def _turn_end(self, number: int) -> TurnEnd:
        """Return how turn ``number`` ends, from the gap behind it."""
        gap = self.gaps[number + 1]
        is_last = number + 2 == len(self.gaps)
        for place, token in enumerate(gap.ids):
            if token in self.special_ids:
                written = self.decode(gap.ids[:place])
                forced = () if is_last else gap.ids[place + 1 :]
                return TurnEnd(token, "", forced, gap.before + written, gap.after)
        core = self.decode(gap.ids)
        stop = core.strip()
        if number % 2 == 1 or not stop:
            raise ConfigError(
                f"the chat template of {self._name} ends an answer with no special token, so nobody"
                " could tell where it ends; add an end-of-turn token to the template."
            )
        first = 0
        while self.decode(gap.ids[first + 1 :]).find(stop) >= 0:
            first += 1
        written = self.decode(gap.ids[:first])
        return TurnEnd(None, stop, gap.ids[first:], gap.before + written, gap.after)

    def _headers(self) -> tuple[str, ...]:
        """Return role headers that are plain text: they must not stand inside a turn."""
        found = {end.stop_text for end in self.ends if end.stop_text}
        for gap in self.gaps[:-1]:
            words = gap.text.split()
            found |= {word for word in words if word.startswith("<|") and word.endswith("|>")}
        return tuple(sorted(found))

    def _verify(self, turns: int) -> None:
        """Write the probes turn by turn and compare with the template."""
        messages = self._probes(0, turns)
        text = self.opening.text
        turns_only = [turn for turn in messages if turn["role"] != "system"]
        for turn, gap in zip(turns_only, self.gaps[1:], strict=True):
            text += turn["content"] + gap.text
        if text != self.render(messages):
            raise ConfigError(
                f"the chat template of {self._name} writes turns otherwise than they stand, so"
                " dialogues cannot be written turn by turn."
            )
        before = [turn for turn in messages if turn["role"] == "system"]
        for count in range(1, 2 * turns, 2):
            prompt = self.render([*before, *turns_only[:count]], prompt=True)
            if not text.startswith(prompt):
                raise ConfigError(
                    f"the chat template of {self._name} writes the beginning of a conversation"
                    " otherwise once it goes on, so several turns cannot be written in one pass;"
                    " set turns to 1."
                )


def _common_run(variants: Sequence[list[tuple[int, int, int]]]) -> list[tuple[int, int, int]]:
    """Return the tokens that every variant has, in their order."""
    shared = set(variants[0]).intersection(*variants[1:])
    return [token for token in variants[0] if token in shared]


def _gap(
    text: str,
    common: Sequence[tuple[int, int, int]],
    variants: Sequence[list[tuple[int, int, int]]],
) -> Gap:
    """Return a gap from the tokens that are always there.

    Characters behind the last common token that no token holds were swallowed by the tokenizer
    and are not to be written.
    """
    if not common:
        return Gap((), text, "", text)
    low, high = common[0][0], common[-1][1]
    merged = [begin for tokens in variants for begin, end, _ in tokens if high <= begin < len(text)]
    start_after = min(merged, default=len(text))
    if not merged:
        # A space merges with most words, if not with those of the probes.
        spaces = len(text) - len(text.rstrip(" "))
        common = [token for token in common if token[0] < len(text) - spaces]
        if common and common[-1][1] <= len(text) - spaces:
            start_after = len(text) - spaces
    return Gap(tuple(number for _, _, number in common), text[:low], text[start_after:], text)

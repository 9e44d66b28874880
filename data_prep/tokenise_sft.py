"""Units of conversations to tokens with a mark on those that are the assistant's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

import numpy as np

from data_prep.encoding import TokenizerSpec, load_tokenizer
from data_prep.options import BuildOptions
from data_prep.records import BadRecordError, Document
from data_prep.supervision import Span, SpanFinder
from data_prep.tokenise import DocumentOptions, DocumentReader, Found, document_arrays
from data_prep.units import Unit, UnitResult
from forgetscale.data import tokenizer_hash
from forgetscale.data.duplicates import text_hash
from forgetscale.data.template_day import asks_for_day, fix_day
from forgetscale.errors import ConfigError

TOO_LONG = "longer than a row"
"""How the reason of a conversation begins that ``--long error`` does not accept."""
TOO_LONG_DROPPED = "longer_than_a_row"


@dataclass(frozen=True, slots=True)
class SftOptions:
    """How conversations become rows.

    Attributes:
        tokenizer: Whose chat template and tokens.
        max_tokens: Tokens of a row.
        long: What becomes of longer conversations: ``drop``; ``truncate``: whole turns are left
            out at the end until it fits and still ends with a whole answer; ``error``.
        min_tokens: Shorter conversations are left out; None: none are.
        day: ``YYYY-MM-DD`` that templates take for today.
    """

    tokenizer: TokenizerSpec
    max_tokens: int
    day: str
    long: str = "drop"
    min_tokens: int | None = None


@dataclass(slots=True)
class Encoded:
    """A rendered conversation as tokens.

    Attributes:
        text: The rendered chat.
        ids: Its tokens.
        supervised: True at tokens that hold a character of an answer or of its end.
        spans: The answers.
        ends: Number of tokens up to the end of each answer.
        num_merged: Answers whose first token also holds the end of the generation prompt.
    """

    text: str
    ids: np.ndarray
    supervised: np.ndarray
    spans: list[Span]
    ends: list[int]
    num_merged: int


class ChatEncoder:
    """Conversations to supervised tokens, by the tokenizer's own chat template.

    The text is tokenised once and whole; offsets say which characters a token stands for.

    Args:
        spec: Which tokenizer.
        day: ``YYYY-MM-DD`` that templates take for today, so that all processes and starts agree.

    Attributes:
        uses_day: Whether the template asks for the date.

    Raises:
        ConfigError: It has no chat template, or one whose date cannot be fixed, or it cannot say
            which characters a token stands for.
    """

    def __init__(self, spec: TokenizerSpec, day: str) -> None:
        self.tokenizer = load_tokenizer(spec.path)
        self.uses_day = False
        if not self.tokenizer.chat_template:
            raise ConfigError(
                f"--sft needs a chat template, the tokenizer in {spec.path} has none; use the"
                " tokenizer of an instruct model."
            )
        if not getattr(self.tokenizer, "is_fast", False):
            raise ConfigError(
                f"--sft needs a tokenizer with offsets, the one in {spec.path} is written in"
                " Python; convert it to a tokenizer.json."
            )
        if isinstance(self.tokenizer.chat_template, str):
            template = fix_day(self.tokenizer.chat_template, date.fromisoformat(day))
            if asks_for_day(template):
                raise ConfigError(
                    f"the chat template in {spec.path} asks for today's date in a form that is not"
                    " given beforehand; write the date format into the call of strftime_now."
                )
            self.uses_day = template != self.tokenizer.chat_template
            self.tokenizer.chat_template = template
        # It only shortens the offsets of tokens with white space: nothing is added to chats.
        self.tokenizer.backend_tokenizer.post_processor = None
        added = self.tokenizer.added_tokens_decoder.values()
        self._control = tuple(
            {token.content for token in added if token.special and token.content.strip()}
        )
        self._control_ids = frozenset(
            number for number, token in self.tokenizer.added_tokens_decoder.items() if token.special
        )
        self._sha256 = tokenizer_hash(spec.path)
        ends = {token.content for token in added} | {self.tokenizer.eos_token or ""}
        self._finder = SpanFinder(self._render, sorted(ends))

    def _render(
        self, messages: Sequence[dict[str, str]], add_generation_prompt: bool = False
    ) -> str:
        text: str = self.tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )
        return text

    def forges_tokens(self, messages: Sequence[dict[str, str]]) -> bool:
        """Return whether a message spells a special token, which would become that token."""
        return any(token in turn["content"] for turn in messages for token in self._control)

    def __call__(self, messages: Sequence[dict[str, str]], first: int = 0) -> Encoded:
        """Return the tokens of a conversation.

        Args:
            messages: The conversation.
            first: Answers before this message are context.

        Raises:
            BadRecordError: The template refuses it, or answers cannot be told from the rest.
        """
        text, spans = self._finder.find(messages, first)
        encoded = self.tokenizer(
            text,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            return_offsets_mapping=True,
        )
        ids = np.array(encoded["input_ids"], np.uint32)
        offsets = np.array(encoded["offset_mapping"], np.int64).reshape(-1, 2)
        supervised = np.zeros(len(ids), bool)
        ends, num_merged = [], 0
        for span in spans:
            inside = (offsets[:, 0] < span.end) & (offsets[:, 1] > span.start)
            places = np.flatnonzero(inside)
            if not len(places):
                raise BadRecordError(f"message {span.message + 1} has no token of its own")
            supervised |= inside
            ends.append(int(places[-1]) + 1)
            num_merged += bool(offsets[places[0], 0] < span.start)
        return Encoded(text, ids, supervised, spans, ends, num_merged)

    def given(self, document: Document, num_messages: int | None = None) -> Encoded:
        """Return a conversation that brought its tokens: these and no others are trained on.

        Args:
            document: With ``tokens``.
            num_messages: Messages that stay, the last of them an answer; None: all.

        Raises:
            BadRecordError: They were made with another tokenizer.
        """
        if document.tokenizer_sha256 != self._sha256:
            raise BadRecordError(
                f"generated with another tokenizer (SHA-256 {document.tokenizer_sha256[:12]}...)"
                f" than --tokenizer ({self._sha256[:12]}...)"
            )
        answers = [n for n, turn in enumerate(document.messages) if turn["role"] == "assistant"]
        # Earlier answers may be context only; the ranges are those of the last ones.
        pairs = list(zip(answers[-len(document.supervised) :], document.supervised, strict=True))
        if num_messages is not None:
            pairs = [pair for pair in pairs if pair[0] < num_messages]
        size = len(document.tokens) if num_messages is None else pairs[-1][1][1]
        ids = np.array(document.tokens[:size], np.uint32)
        supervised = np.zeros(size, bool)
        for _, (start, end) in pairs:
            supervised[start:end] = True
        ends = [end for _, (_, end) in pairs]
        spans = [
            Span(message, start, end, int(ids[end - 1]) in self._control_ids)
            for message, (start, end) in pairs
        ]
        return Encoded(self.tokenizer.decode(ids.tolist()), ids, supervised, spans, ends, 0)


class UnitSupervisor:
    """Turn units into supervised tokens in this process.

    Arrays of a result as ``UnitTokenizer`` makes them, and ``supervised`` ``[tokens]`` uint8. What
    it counts: ``answers``, ``answers_without_end`` (no end-of-turn marker follows them),
    ``merged_starts`` (see ``Encoded``), ``long_documents``, ``truncated_documents``,
    ``left_out_turns`` of those and ``open_turns`` (after the last answer).
    """

    def __init__(self, documents: DocumentOptions, options: SftOptions) -> None:
        self.reader = DocumentReader(documents)
        self.encode = ChatEncoder(options.tokenizer, options.day)
        self._options = options

    @property
    def splits(self) -> bool:
        """Whether long documents are divided among workers: a conversation is one text."""
        return False

    def __call__(self, unit: Unit) -> UnitResult:
        """Return the conversations of ``unit``; bad lines become rejects."""
        result = UnitResult({})
        kept: list[tuple[Found, Encoded]] = []
        for found in self.reader.read(unit, result):
            messages = found.document.messages
            if not found.document.tokens and self.encode.forges_tokens(messages):
                result.dropped["special_token_in_message"] += 1
                continue
            try:
                encoded = self._fitting(found.document, result)
            except BadRecordError as error:
                result.rejects.append((found.line, str(error)))
                continue
            if encoded is None:
                result.dropped[TOO_LONG_DROPPED] += 1
            elif len(encoded.ids) < (self._options.min_tokens or 0):
                result.dropped["too_few_tokens"] += 1
            else:
                kept.append((found, encoded))
                result.counts["open_turns"] += found.document.num_open_turns
                result.counts["answers"] += len(encoded.spans)
                result.counts["merged_starts"] += encoded.num_merged
                without = sum(not span.has_end for span in encoded.spans)
                result.counts["answers_without_end"] += without
        result.rejects.sort()
        tokens = [np.empty(0, np.uint32), *(encoded.ids for _, encoded in kept)]
        flags = [np.empty(0, bool), *(encoded.supervised for _, encoded in kept)]
        result.arrays = document_arrays(
            np.concatenate(tokens),
            lens=[len(encoded.ids) for _, encoded in kept],
            lines=[found.line for found, _ in kept],
            sizes=[len(encoded.text.encode("utf-8")) for _, encoded in kept],
            hashes=[text_hash(found.text) for found, _ in kept],
            is_chat=[True] * len(kept),
        ) | {"supervised": np.concatenate(flags).astype(np.uint8)}
        return result

    def _encode(self, document: Document, num_messages: int | None = None) -> Encoded:
        """Return the tokens of a conversation, of its first messages if asked."""
        if document.tokens:
            return self.encode.given(document, num_messages)
        return self.encode(document.messages[:num_messages], document.first_supervised)

    def _fitting(self, document: Document, result: UnitResult) -> Encoded | None:
        """Return the conversation as tokens that fit a row, or None if it is dropped.

        Turns are left out before rendering, so that what stays is what the template makes of a
        conversation that ends there.
        """
        options = self._options
        encoded = self._encode(document)
        if len(encoded.ids) <= options.max_tokens:
            return encoded
        result.counts["long_documents"] += 1
        if options.long == "error":
            raise BadRecordError(
                f"{TOO_LONG} ({len(encoded.ids)} tokens, --block-size is {options.max_tokens})"
            )
        if options.long == "drop":
            return None
        for span, end in zip(
            reversed(encoded.spans[:-1]), reversed(encoded.ends[:-1]), strict=True
        ):
            if end <= options.max_tokens:
                num_messages = span.message + 1
                shorter = self._encode(document, num_messages)
                if len(shorter.ids) <= options.max_tokens:
                    result.counts["truncated_documents"] += 1
                    result.counts["left_out_turns"] += len(document.messages) - num_messages
                    return shorter
        return None


def sft_payload(
    options: BuildOptions, day: str | None, counts: Counter[str], dropped: Counter[str]
) -> dict[str, Any]:
    """Return what the manifest says about supervision, beside the number of tokens.

    Args:
        options: What was built.
        day: Date in the rendered chats, if the template asks for it.
        counts: Of all units together.
        dropped: Conversations left out, by reason.
    """
    return {
        "format": options.format,
        "template_day": day,
        "num_answers": counts["answers"],
        "num_answers_without_end": counts["answers_without_end"],
        "num_merged_starts": counts["merged_starts"],
        "num_open_turns": counts["open_turns"],
        "long": {
            "policy": options.long,
            "num_long": counts["long_documents"],
            "num_truncated": counts["truncated_documents"],
            "num_turns_left_out": counts["left_out_turns"],
            "num_dropped": dropped[TOO_LONG_DROPPED],
        },
    }

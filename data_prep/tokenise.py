"""Units of lines to tokens, or to what the choice of documents needs to know about them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jinja2 import TemplateError

from data_prep.conversations import parse_conversation
from data_prep.encoding import Encoder, TokenizerSpec
from data_prep.filters import DocumentFilter, FilterOptions
from data_prep.readers import Line
from data_prep.records import BadRecordError, Document, parse_record, parse_text, undo_escapes
from data_prep.units import PIECE_CHARACTERS, UNIT_BYTES, Part, Unit, UnitResult, cut_text
from forgetscale.data.duplicates import NUM_POSITIONS, hash_array, signature, text_hash


@dataclass(frozen=True, slots=True)
class DocumentOptions:
    """How lines become documents and which are left out.

    Attributes:
        chat: Render ``messages`` with the chat template.
        undo_escapes: Undo MADLAD-400 escapes in the text of records.
        text_field: Field that holds the text.
        filters: Conditions on a document; None where they were checked before.
        evaluation: File of n-gram hashes of evaluation texts, or None.
        sft_format: Lines are conversations of this format; None: they are not.
    """

    chat: bool
    undo_escapes: bool
    text_field: str = "text"
    filters: FilterOptions | None = None
    evaluation: Path | None = None
    sft_format: str | None = None


@dataclass(frozen=True, slots=True)
class TokenizeOptions:
    """How documents become tokens.

    Attributes:
        tokenizer: Which one.
        end_token: Id appended to each document, or None.
        max_document_tokens: Longer documents are cut to this many tokens; None: never.
        min_document_tokens: Shorter documents are left out; None: none are.
    """

    tokenizer: TokenizerSpec
    end_token: int | None
    max_document_tokens: int | None = None
    min_document_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """A document that stays."""

    line: int
    document: Document
    text: str
    """What filters and hashes look at: escapes undone, or the messages."""
    escapes: Counter[str]


class DocumentReader:
    """Lines to the documents that stay; the others are counted with their reason.

    Args:
        options: How.
    """

    def __init__(self, options: DocumentOptions) -> None:
        self._options = options
        self._filter = (
            None if options.filters is None else DocumentFilter(options.filters, options.evaluation)
        )

    def read(self, unit: Unit, result: UnitResult) -> list[Found]:
        """Return the documents of ``unit`` that stay; note the others in ``result``."""
        found = []
        result.num_lines, result.stored_bytes = len(unit.lines), unit.stored_bytes
        for line in unit.lines:
            try:
                one = self.parse(line, plain_text=unit.plain_text)
            except BadRecordError as error:
                result.rejects.append((line.number, str(error)))
                continue
            if not one.text:
                result.counts["empty_documents"] += 1
            elif (reason := self.reason_to_drop(one)) is not None:
                result.dropped[reason] += 1
            else:
                found.append(one)
        return found

    def parse(self, line: Line, *, plain_text: bool) -> Found:
        """Return the document of a line.

        Raises:
            BadRecordError: It holds none; the message says why.
        """
        options = self._options
        if line.reject:
            raise BadRecordError(line.reject)
        if plain_text and options.sft_format is not None:
            raise BadRecordError("plain text is no conversation")
        if plain_text:
            document = parse_text(line.data)
        elif options.sft_format is not None:
            document = parse_conversation(line.data, options.sft_format)
        else:
            document = parse_record(line.data, chat=options.chat, field=options.text_field)
        if document.messages:
            shown = json.dumps(document.messages, ensure_ascii=False, sort_keys=True)
            return Found(line.number, document, shown, Counter())
        if plain_text or not options.undo_escapes:
            return Found(line.number, document, document.text, Counter())
        text, escapes = undo_escapes(document.text)
        return Found(line.number, document, text, escapes)

    def reason_to_drop(self, found: Found) -> str | None:
        """Return why a document is left out, or None."""
        if found.document.left_out:
            return found.document.left_out
        if self._filter is None:
            return None
        messages = found.document.messages
        text = "\n".join(turn["content"] for turn in messages) if messages else found.text
        return self._filter.reason_to_drop(text)

    def split(self, line: Line, number: int, *, plain_text: bool) -> list[Unit]:
        """Return a long line as units of pieces of its text, or as one unit where it is none.

        Args:
            line: The line.
            number: Number of the first of the units.
            plain_text: Whether the line is text itself.
        """
        whole = [Unit(number, [line], plain_text)]
        try:
            found = self.parse(line, plain_text=plain_text)
        except BadRecordError:
            return whole
        if found.document.messages or self.reason_to_drop(found) is not None:
            return whole
        groups: list[list[Line]] = [[]]
        size = 0
        for piece in cut_text(found.text):
            data = piece.encode("utf-8")
            if groups[-1] and size + len(data) > UNIT_BYTES:
                groups.append([])
                size = 0
            groups[-1].append(Line(line.number, data))
            size += len(data)
        if len(groups) == 1:
            return whole
        digest = text_hash(found.text).hex()
        return [
            Unit(
                number + index,
                group,
                plain_text,
                part=Part(index, len(groups), digest, dict(found.escapes)),
            )
            for index, group in enumerate(groups)
        ]


class UnitTokenizer:
    """Turn units into tokens in this process.

    Arrays of a result, documents one after another: ``tokens`` ``[tokens]`` uint32; ``doc_lens``
    tokens with the end token, ``doc_lines``, ``doc_bytes`` UTF-8 bytes of the text (in proportion
    where it was cut), ``doc_hash`` half of the text hash, ``doc_chat`` 1 for chats, each
    ``[documents]``.
    """

    def __init__(self, documents: DocumentOptions, options: TokenizeOptions) -> None:
        self.reader = DocumentReader(documents)
        self.encoder = Encoder(options.tokenizer)
        self._options = options

    @property
    def splits(self) -> bool:
        """Whether long documents are divided among workers."""
        options = self._options
        return options.max_document_tokens is None and options.min_document_tokens is None

    def __call__(self, unit: Unit) -> UnitResult:
        """Return the documents of ``unit``; bad lines become rejects."""
        result = UnitResult({})
        if unit.part is not None:
            return self._part(unit, unit.part, result)
        documents = self.reader.read(unit, result)
        plain = [found for found in documents if not found.document.messages]
        tokens = dict(self._encode_plain(plain))
        chats: dict[int, str] = {}
        for found in documents:
            if found.document.messages:
                try:
                    chats[found.line] = self.encoder.render(found.document.messages)
                except TemplateError as error:
                    reason = f"refused by the chat template ({error})"
                    result.rejects.append((found.line, reason))
        result.rejects.sort()
        encoded = self.encoder(list(chats.values()), special_as_text=False)
        tokens |= {line: np.array(ids, np.uint32) for line, ids in zip(chats, encoded, strict=True)}
        lens, sizes, kept, hashes, is_chat = [], [], [], [], []
        pieces: list[np.ndarray] = [np.empty(0, np.uint32)]
        for found in documents:
            if found.line not in tokens:
                continue
            ids = tokens[found.line]
            if not len(ids):
                result.counts["empty_documents"] += 1
                continue
            if len(ids) < (self._options.min_document_tokens or 0):
                result.dropped["too_few_tokens"] += 1
                continue
            result.escapes += found.escapes
            is_chat.append(found.line in chats)
            text = chats.get(found.line, found.text)
            ids, size = self._finish(ids, len(text.encode("utf-8")), result)
            pieces.append(ids)
            lens.append(len(ids))
            sizes.append(size)
            kept.append(found.line)
            hashes.append(text_hash(found.text))
        result.arrays = document_arrays(
            np.concatenate(pieces),
            lens=lens,
            lines=kept,
            sizes=sizes,
            hashes=hashes,
            is_chat=is_chat,
        )
        return result

    def _part(self, unit: Unit, part: Part, result: UnitResult) -> UnitResult:
        """Return the tokens of a part of a long document; the first part counts for the whole."""
        texts = [line.data.decode("utf-8") for line in unit.lines]
        encoded = self.encoder(texts, special_as_text=True)
        ids = np.concatenate([np.array(one, np.uint32) for one in encoded])
        end = self._options.end_token
        if part.index == part.count - 1 and end is not None and (not len(ids) or ids[-1] != end):
            ids = np.append(ids, np.uint32(end))
        if part.index == 0:
            result.escapes += Counter(part.escapes)
            result.num_lines = 1
            result.counts["split_documents"] = 1
        result.part = (part.index, part.count)
        result.stored_bytes = unit.stored_bytes
        size = sum(len(line.data) for line in unit.lines)
        digest = bytes.fromhex(part.text_hash)
        result.arrays = document_arrays(
            ids,
            lens=[len(ids)],
            lines=[unit.lines[0].number],
            sizes=[size],
            hashes=[digest],
            is_chat=[False],
        )
        return result

    def _encode_plain(self, documents: list[Found]) -> Iterator[tuple[int, np.ndarray]]:
        """Yield line and ids of plain documents, very long ones piece by piece."""
        short = [found for found in documents if len(found.text) <= PIECE_CHARACTERS]
        encoded = self.encoder([found.text for found in short], special_as_text=True)
        for found, ids in zip(short, encoded, strict=True):
            yield found.line, np.array(ids, np.uint32)
        for found in documents:
            if len(found.text) > PIECE_CHARACTERS:
                pieces = [
                    np.array(self.encoder([piece], special_as_text=True)[0], np.uint32)
                    for piece in cut_text(found.text)
                ]
                yield found.line, np.concatenate(pieces)

    def _finish(
        self, ids: np.ndarray, num_bytes: int, result: UnitResult
    ) -> tuple[np.ndarray, int]:
        """Cut a document if it is too long and end it; return ids and bytes of text."""
        limit = self._options.max_document_tokens
        if limit is not None and len(ids) > limit:
            num_bytes = num_bytes * limit // len(ids)
            ids = ids[:limit]
            result.counts["truncated_documents"] += 1
        end = self._options.end_token
        if end is not None and ids[-1] != end:
            ids = np.append(ids, np.uint32(end))
        return ids, num_bytes


def document_arrays(
    tokens: np.ndarray,
    *,
    lens: list[int],
    lines: list[int],
    sizes: list[int],
    hashes: list[bytes],
    is_chat: list[bool],
) -> dict[str, np.ndarray]:
    """Return the arrays of a result; see ``UnitTokenizer``."""
    return {
        "tokens": tokens,
        "doc_lens": np.array(lens, np.int64),
        "doc_lines": np.array(lines, np.int64),
        "doc_bytes": np.array(sizes, np.int64),
        "doc_hash": hash_array(hashes)[:, 0].copy(),
        "doc_chat": np.array(is_chat, np.uint8),
    }


class UnitSurveyor:
    """Find in each unit what the choice of documents needs; a first pass over the input.

    Arrays of a result: ``lines``, ``hashes`` ``[documents, 2]`` and, for near duplicates,
    ``signatures`` ``[documents, 128]`` of the documents that stay so far.

    Args:
        documents: How lines become documents.
        near: Whether signatures are needed.
    """

    def __init__(self, documents: DocumentOptions, *, near: bool) -> None:
        self.reader = DocumentReader(documents)
        self._near = near

    @property
    def splits(self) -> bool:
        """Whether long documents are divided among workers: here a whole one is needed."""
        return False

    def __call__(self, unit: Unit) -> UnitResult:
        """Return lines and hashes of the documents of ``unit``."""
        result = UnitResult({})
        found = self.reader.read(unit, result)
        result.arrays = {
            "lines": np.array([one.line for one in found], np.int64),
            "hashes": hash_array([text_hash(one.text) for one in found]),
        }
        if self._near:
            rows = [signature(one.text) for one in found]
            empty = np.empty((0, NUM_POSITIONS), np.uint32)
            result.arrays["signatures"] = np.stack(rows) if rows else empty
        return result

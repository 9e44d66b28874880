"""Units of lines to tokens, in this process or in several, always in order."""

from __future__ import annotations

import json
import os
import threading
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers import logging as transformers_logging

from data_prep.readers import Line
from data_prep.records import BadRecordError, Document, parse_record, parse_text, undo_escapes
from forgetscale.errors import ConfigError, DataError, ForgetScaleError

_NO_LIMIT = 1 << 60


@dataclass(frozen=True, slots=True)
class TokenizeOptions:
    """What a worker must know.

    Attributes:
        tokenizer: Folder that ``AutoTokenizer`` loads.
        chat: Render ``messages`` with the chat template.
        end_token: Id appended to each document, or None.
        undo_escapes: Undo MADLAD-400 escapes in ``text``.
        max_document_tokens: Longer documents are cut to this many tokens; None: never.
        text_field: Field that holds the text.
    """

    tokenizer: Path
    chat: bool
    end_token: int | None
    undo_escapes: bool
    max_document_tokens: int | None
    text_field: str = "text"


@dataclass(frozen=True, slots=True)
class Unit:
    """Some lines of one file: the piece of work handed to a worker."""

    file_index: int
    lines: list[Line]
    plain_text: bool = False
    """Whether lines are text themselves and not JSON objects."""


@dataclass(slots=True)
class TokenizedUnit:
    """Documents of a unit, one after another, and what was found on the way."""

    file_index: int
    tokens: np.ndarray
    doc_lens: np.ndarray
    """``[documents]`` tokens, end token included."""
    doc_lines: np.ndarray
    """``[documents]`` line numbers."""
    doc_bytes: np.ndarray
    """``[documents]`` UTF-8 bytes of the text, in proportion where it was cut."""
    rejects: list[tuple[int, str]] = field(default_factory=list)
    escapes: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)


def load_tokenizer(directory: Path) -> Any:
    """Load the tokenizer of a local folder, without network and without code from it.

    Raises:
        DataError: The folder does not load.
    """
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    description = Path(directory) / "tokenizer.json"
    try:
        if description.is_file():
            json.loads(description.read_bytes())
        tokenizer = AutoTokenizer.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"the tokenizer in {directory} does not load ({reason}); give a folder that"
            " AutoTokenizer.from_pretrained loads."
        ) from error
    tokenizer.model_max_length = _NO_LIMIT
    return tokenizer


def end_token_id(tokenizer: Any, policy: str, directory: Path) -> int | None:
    """Return the id that ends a document under ``policy`` (``eos`` or ``none``).

    Raises:
        ConfigError: The policy is ``eos`` and the tokenizer has no such token.
    """
    if policy == "none":
        return None
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"the tokenizer in {directory} has no end-of-sequence token; set eos_token in its"
            " tokenizer_config.json or pass --document-end none."
        )
    return int(tokenizer.eos_token_id)


def padding_token_id(tokenizer: Any) -> int:
    """Return the id for padding: the pad token, else the end-of-sequence token, else 0."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def plain_backend(tokenizer: Any) -> Any | None:
    """Return the Rust tokenizer if calling it directly gives what the Python class gives.

    It does where the class changes nothing on the way (truncation and padding switched off): the
    same ids without offsets, 1.3 times as fast. None for slow tokenizers and for classes with
    their own encoding.
    """
    kind, plain = type(tokenizer), PreTrainedTokenizerFast
    if not isinstance(tokenizer, plain):
        return None
    if kind.__call__ is not plain.__call__ or kind._encode_plus is not plain._encode_plus:
        return None
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return backend


def read_document(line: Line, options: TokenizeOptions, *, plain_text: bool) -> Document:
    """Return the document of a line.

    Raises:
        BadRecordError: It holds none; the message says why.
    """
    if line.reject:
        raise BadRecordError(line.reject)
    if plain_text:
        return parse_text(line.data)
    return parse_record(line.data, chat=options.chat, field=options.text_field)


class UnitTokenizer:
    """Turn units into tokens in this process."""

    def __init__(self, options: TokenizeOptions) -> None:
        self._options = options
        self._tokenizer = load_tokenizer(options.tokenizer)
        self._backend = plain_backend(self._tokenizer)

    def __call__(self, unit: Unit) -> TokenizedUnit:
        """Return the documents of ``unit``; bad lines become rejects."""
        rejects: list[tuple[int, str]] = []
        escapes: Counter[str] = Counter()
        plain: list[tuple[int, str]] = []
        chats: list[tuple[int, str]] = []
        counts: Counter[str] = Counter()
        for line in unit.lines:
            try:
                document = read_document(line, self._options, plain_text=unit.plain_text)
                if document.messages:
                    chats.append((line.number, self._render(document)))
                    continue
            except BadRecordError as error:
                rejects.append((line.number, str(error)))
                continue
            text = document.text
            if self._options.undo_escapes and not unit.plain_text:
                text, found = undo_escapes(text)
                escapes += found
            plain.append((line.number, text))
        documents = self._encode(plain, special_as_text=True)
        documents |= self._encode(chats, special_as_text=False)
        texts = dict(plain) | dict(chats)
        counts["chat_documents"] = sum(1 for number, _ in chats if documents[number])
        kept: list[tuple[int, list[int], int]] = []
        for number in sorted(documents):
            if documents[number]:
                kept.append((number, *self._finish(documents[number], texts[number], counts)))
            else:
                counts["empty_documents"] += 1
        ids = [np.asarray(tokens, dtype=np.uint32) for _, tokens, _ in kept]
        return TokenizedUnit(
            file_index=unit.file_index,
            tokens=np.concatenate([np.empty(0, np.uint32), *ids]),
            doc_lens=np.array([len(tokens) for tokens in ids], dtype=np.int64),
            doc_lines=np.array([number for number, _, _ in kept], dtype=np.int64),
            doc_bytes=np.array([size for _, _, size in kept], dtype=np.int64),
            rejects=rejects,
            escapes=escapes,
            counts=counts,
        )

    def _render(self, document: Document) -> str:
        try:
            text: str = self._tokenizer.apply_chat_template(
                list(document.messages), tokenize=False, add_generation_prompt=False
            )
        except TemplateError as error:
            raise BadRecordError(f"refused by the chat template ({error})") from error
        return text

    def _encode(
        self, texts: list[tuple[int, str]], *, special_as_text: bool
    ) -> dict[int, list[int]]:
        """Return ids by line number, no special token added.

        A special token spelled out in plain text is encoded as ordinary text, so that raw text
        cannot forge document ends or chat turns; in rendered chats it is the token.
        """
        if not texts:
            return {}
        if self._backend is not None:
            self._backend.encode_special_tokens = special_as_text
            encodings = self._backend.encode_batch_fast(
                [text for _, text in texts], add_special_tokens=False
            )
            encoded = [encoding.ids for encoding in encodings]
        else:
            encoded = self._tokenizer(
                [text for _, text in texts],
                add_special_tokens=False,
                return_attention_mask=False,
                return_token_type_ids=False,
                split_special_tokens=special_as_text,
            )["input_ids"]
        return {number: ids for (number, _), ids in zip(texts, encoded, strict=True)}

    def _finish(self, tokens: list[int], text: str, counts: Counter[str]) -> tuple[list[int], int]:
        """Cut a document if it is too long, end it, and count the bytes of its text."""
        num_bytes = len(text.encode("utf-8"))
        limit = self._options.max_document_tokens
        if limit is not None and len(tokens) > limit:
            num_bytes = num_bytes * limit // len(tokens)
            tokens = tokens[:limit]
            counts["truncated_documents"] += 1
        end = self._options.end_token
        if end is not None and tokens[-1] != end:
            tokens = [*tokens, end]
        return tokens, num_bytes


_worker: UnitTokenizer | None = None


def _start_worker(options: TokenizeOptions) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = parent_process()
    if parent is not None:
        sentinel = parent.sentinel
        threading.Thread(
            target=lambda: (connection.wait([sentinel]), os._exit(1)), daemon=True
        ).start()
    _worker = UnitTokenizer(options)


def _run_unit(unit: Unit) -> TokenizedUnit:
    assert _worker is not None
    return _worker(unit)


def tokenize_units(
    units: Iterator[Unit], options: TokenizeOptions, *, num_processes: int
) -> Iterator[TokenizedUnit]:
    """Yield the result of each unit, in order, for any number of processes.

    Args:
        units: Work, read lazily; at most a few units per process are held in memory.
        options: Same for all workers.
        num_processes: 1 works in this process, without starting others.

    Raises:
        ForgetScaleError: A worker process died.
    """
    if num_processes == 1:
        yield from map(UnitTokenizer(options), units)
        return
    pending: deque[Future[TokenizedUnit]] = deque()
    pool = ProcessPoolExecutor(
        num_processes,
        mp_context=get_context("spawn"),
        initializer=_start_worker,
        initargs=(options,),
    )
    try:
        for unit in units:
            pending.append(pool.submit(_run_unit, unit))
            if len(pending) >= 3 * num_processes:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise ForgetScaleError(
            "a tokenizer process died (often for lack of memory); nothing was written; use fewer"
            " --num-processes."
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)

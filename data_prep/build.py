"""Build a token set: read, sample, tokenise, pack, write, publish."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.ledger import Ledger
from data_prep.readers import Line, ReadOptions, SourceReader, is_plain_text
from data_prep.sample import select_documents
from data_prep.sources import estimate_text_bytes, find_sources
from data_prep.tokenise import (
    TokenizeOptions,
    Unit,
    end_token_id,
    load_tokenizer,
    padding_token_id,
    read_document,
    tokenize_units,
)
from forgetscale.artifact import ArtifactWriter
from forgetscale.data import (
    BestFitPacker,
    ConcatPacker,
    Packer,
    ShardWriter,
    pack_doc_id,
    token_set_payload,
    tokenizer_hash,
)
from forgetscale.data.format import KIND, LINE_BITS, REJECTS_NAME, rows_per_batch
from forgetscale.errors import ConfigError
from forgetscale.progress import Progress

_UNIT_BYTES = 1 << 20
_SMALL_BYTES = 24 << 20
_REPORT_BYTES = 1 << 18


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildOptions:
    """What to build; the fields are those of ``python -m data_prep build``."""

    inputs: tuple[str, ...]
    tokenizer: Path
    block_size: int
    output: Path
    language: str | None = None
    split: str | None = None
    release: str | None = None
    max_documents: int | None = None
    seed: int = 0
    chat: bool = False
    packing: str = "concat"
    document_end: str = "eos"
    escapes: str = "undo"
    max_document_tokens: int | None = None
    max_reject_fraction: float = 0.05
    text_field: str = "text"
    text_documents: str = "line"
    max_line_bytes: int = 256 << 20
    max_ratio: float = 200.0
    max_file_bytes: int = 1 << 40
    num_processes: int | None = None
    log: Path | None = None

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        for name, least in (("block_size", 1), ("max_documents", 0), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"--{name.replace('_', '-')} must be >= {least}, got {value}.")
        limits = ("max_line_bytes", "max_ratio", "max_file_bytes")
        for name in ("max_document_tokens", "num_processes", *limits):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be >= 1, got {value}.")
        if not 0 <= self.max_reject_fraction <= 1:
            raise ConfigError(
                f"--max-reject-fraction must be in 0..1, got {self.max_reject_fraction}."
            )

    @property
    def read(self) -> ReadOptions:
        """How files are read."""
        return ReadOptions(
            max_line_bytes=self.max_line_bytes,
            max_ratio=self.max_ratio,
            max_file_bytes=self.max_file_bytes,
            text_field=self.text_field,
            chat=self.chat,
            text_documents=self.text_documents,
        )


def build(options: BuildOptions) -> dict[str, Any]:
    """Build the token set and return its manifest payload.

    Rows depend on the input files, their order, the tokenizer and the options alone: not on the
    number of processes or the size of work units.

    Raises:
        ConfigError: Options clash.
        DataError: Input is missing, damaged or mostly unusable; nothing is left behind.
    """
    paths = find_sources(
        options.inputs, language=options.language, split=options.split, release=options.release
    )
    tokenizer_sha256 = tokenizer_hash(options.tokenizer)
    work, vocab_size, pad_token = _check_tokenizer(options)
    with ArtifactWriter(options.output, KIND, recipe=_recipe(options)) as artifact:
        with Ledger(paths, artifact.path / REJECTS_NAME, options.block_size) as ledger:
            selected, sampling = _sample(paths, options, work, ledger)
            writer = ShardWriter(
                artifact.path, block_size=options.block_size, vocab_size=vocab_size
            )
            packer = _make_packer(options, pad_token, writer)
            _write_rows(paths, options, work, selected, ledger, writer, packer)
            dropped = packer.dropped_tail_tokens
            ledger.check(options.max_reject_fraction, writer.num_rows, dropped)
        num_text_bytes, num_dropped = ledger.kept_text(dropped)
        artifact.payload = token_set_payload(
            block_size=options.block_size,
            vocab_size=vocab_size,
            num_rows=writer.num_rows,
            num_documents=ledger.num_documents,
            num_text_bytes=num_text_bytes,
            tokenizer_sha256=tokenizer_sha256,
            shards=writer.close(),
            num_padding_tokens=packer.num_padding_tokens,
        ) | {
            "tokenizer_path": str(options.tokenizer.resolve()),
            "document_end": {"policy": options.document_end, "token_id": work.end_token},
            "packing": {
                "method": packer.METHOD,
                "version": packer.VERSION,
                "dropped_tail_tokens": dropped,
                "dropped_tail_documents": num_dropped,
            },
            "row_shares": _row_shares(packer, writer.num_rows, ledger.num_documents),
            "chat": options.chat,
            "text": {"escapes": options.escapes, "special_tokens": "as_text"},
            "documents": _document_counts(ledger),
            "sampling": sampling,
            "sources": ledger.sources,
            "rejects": ledger.rejects_payload(options.max_reject_fraction),
        }
        artifact.inputs = {"tokenizer": tokenizer_sha256} | {
            source["path"]: source["sha256"] for source in ledger.sources
        }
    return artifact.payload


def _check_tokenizer(options: BuildOptions) -> tuple[TokenizeOptions, int, int]:
    """Return what workers must know, vocabulary size and pad id; refuse what cannot work."""
    tokenizer = load_tokenizer(options.tokenizer)
    if options.chat and not tokenizer.chat_template:
        raise ConfigError(
            f"--chat needs a chat template, the tokenizer in {options.tokenizer} has none; use the"
            " tokenizer of an instruct model."
        )
    work = TokenizeOptions(
        tokenizer=options.tokenizer,
        chat=options.chat,
        end_token=end_token_id(tokenizer, options.document_end, options.tokenizer),
        undo_escapes=options.escapes == "undo",
        max_document_tokens=options.max_document_tokens,
        text_field=options.text_field,
    )
    vocab_size = max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1)
    return work, vocab_size, padding_token_id(tokenizer)


def _recipe(options: BuildOptions) -> dict[str, Any]:
    fields = asdict(options)
    return {
        name: str(value) if isinstance(value, Path) else value for name, value in fields.items()
    }


def _make_packer(options: BuildOptions, pad_token: int, writer: ShardWriter) -> Packer:
    batch = rows_per_batch(options.block_size)
    if options.packing == "best-fit":
        return BestFitPacker(options.block_size, batch, writer.dtype, pad_id=pad_token)
    return ConcatPacker(options.block_size, batch, writer.dtype)


def _row_shares(packer: Packer, num_rows: int, num_documents: int) -> dict[str, Any]:
    """Return what packing made of the documents: measured, not promised."""
    return {
        "num_pieces": packer.num_pieces,
        "num_padding_tokens": packer.num_padding_tokens,
        "padding_share": packer.num_padding_tokens / (num_rows * packer.block_size),
        "num_cut_documents": packer.num_cut_documents,
        "cut_share": packer.num_cut_documents / num_documents,
    }


def _document_counts(ledger: Ledger) -> dict[str, int]:
    chats = ledger.counts["chat_documents"]
    return {
        "num_chats": chats,
        "num_plain": ledger.num_documents - chats,
        "num_empty": ledger.counts["empty_documents"],
        "num_truncated": ledger.counts["truncated_documents"],
    }


def _sample(
    paths: Sequence[Path], options: BuildOptions, work: TokenizeOptions, ledger: Ledger
) -> tuple[np.ndarray | None, dict[str, int] | None]:
    """Choose documents in a first pass over the input, if a number was asked for."""
    if not options.max_documents:
        return None, None
    with _progress(paths, "sample", options) as progress:
        selected, num_candidates = select_documents(
            _read_lines(paths, options.read, ledger, progress),
            max_documents=options.max_documents,
            seed=options.seed,
            read=lambda index, line: read_document(
                line, work, plain_text=is_plain_text(paths[index])
            ),
            on_reject=ledger.reject,
        )
    return selected, {
        "max_documents": options.max_documents,
        "seed": options.seed,
        "num_candidates": num_candidates,
    }


def _write_rows(
    paths: Sequence[Path],
    options: BuildOptions,
    work: TokenizeOptions,
    selected: np.ndarray | None,
    ledger: Ledger,
    writer: ShardWriter,
    packer: Packer,
) -> None:
    """Tokenise, pack and write all documents."""
    with _progress(paths, "build", options) as progress:
        units = _units(_read_lines(paths, options.read, ledger, progress), paths, selected)
        for result in tokenize_units(units, work, num_processes=_num_processes(paths, options)):
            ledger.add(result)
            doc_ids = result.doc_lines.astype(np.uint64) | np.uint64(result.file_index << LINE_BITS)
            for rows in packer.add(result.tokens, result.doc_lens, doc_ids):
                writer.append(rows)
        for rows in packer.finish():
            writer.append(rows)


def _progress(paths: Sequence[Path], label: str, options: BuildOptions) -> Progress:
    total = sum(path.stat().st_size for path in paths)
    return Progress(total, label, unit="byte", log_path=options.log)


def _read_lines(
    paths: Sequence[Path], options: ReadOptions, ledger: Ledger, progress: Progress
) -> Iterator[tuple[int, Line]]:
    """Yield ``(file index, line)`` of the whole input, in order."""
    done = reported = 0
    for index, path in enumerate(paths):
        num_lines = 0
        with SourceReader(path, options) as reader:
            for line in reader.lines():
                num_lines += 1
                yield index, line
                if done + reader.num_bytes - reported >= _REPORT_BYTES:
                    reported = done + reader.num_bytes
                    progress.update(reported, path.name)
            ledger.finish_source(index, reader, num_lines)
            done += reader.num_bytes
    if reported < done:
        progress.update(done)


def _units(
    lines: Iterator[tuple[int, Line]], paths: Sequence[Path], selected: np.ndarray | None
) -> Iterator[Unit]:
    """Group chosen lines into units of about ``_UNIT_BYTES``, each from one file."""
    unit = Unit(0, [])
    num_bytes = 0
    next_choice = 0
    for file_index, line in lines:
        if selected is not None:
            if next_choice == len(selected):
                continue
            if int(selected[next_choice]) != pack_doc_id(file_index, line.number):
                continue
            next_choice += 1
        if unit.lines and (file_index != unit.file_index or num_bytes >= _UNIT_BYTES):
            yield unit
            unit, num_bytes = Unit(file_index, []), 0
        if not unit.lines:
            unit = Unit(file_index, [], is_plain_text(paths[file_index]))
        unit.lines.append(line)
        num_bytes += len(line.data)
    if unit.lines:
        yield unit


def _num_processes(paths: Sequence[Path], options: BuildOptions) -> int:
    """Return how many processes tokenise; small input is not worth starting any.

    In one process the tokenizer may use threads, unless one process was asked for.
    """
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    chosen = options.num_processes or num_cores or 1
    if options.num_processes is None and estimate_text_bytes(paths) < _SMALL_BYTES:
        chosen = 1
    use_threads = chosen == 1 and options.num_processes is None
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if use_threads else "false"
    return chosen

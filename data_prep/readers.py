"""Reading input files line by line: every format, bounded memory, bytes counted and hashed.

Text formats (``.jsonl``, ``.txt``, alone or with ``.gz`` or ``.zst``) are decompressed as they are
read; Parquet and Arrow rows become JSON lines, so that everything after this module sees lines.
Three limits keep damaged or hostile files from filling memory or disk: the longest line, the
ratio of decompressed to stored bytes, and the decompressed bytes of one file.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from forgetscale.artifact import hash_file
from forgetscale.errors import DataError

TEXT_SUFFIXES = tuple(
    kind + packing for kind in (".jsonl", ".txt") for packing in ("", ".gz", ".zst")
)
TABLE_SUFFIXES = (".parquet", ".arrow")
SUFFIXES = TEXT_SUFFIXES + TABLE_SUFFIXES
_GZIP_MIN_BYTES = 20
_BLOCK_BYTES = 1 << 20
_TABLE_ROWS = 1024
_RATIO_FROM_BYTES = 16 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadOptions:
    """How files are read; defaults are those of ``python -m data_prep build``.

    Attributes:
        max_line_bytes: Longer lines are set aside, never held in memory; >= 1.
        max_ratio: Decompressed bytes for each stored byte, looked at beyond the first 16 MiB; >= 1.
        max_file_bytes: Decompressed bytes of one file; >= 1.
        text_field: Field or column that holds the text.
        chat: Read the column ``messages`` of tables as well.
        text_documents: What a document is in plain text: ``line``, ``paragraph`` (lines between
            blank ones) or ``file``.
        all_columns: Read every column of tables.
        columns: Read these columns of tables instead of the text, as far as they are there.
    """

    max_line_bytes: int = 256 << 20
    max_ratio: float = 200.0
    max_file_bytes: int = 1 << 40
    text_field: str = "text"
    chat: bool = False
    text_documents: str = "line"
    all_columns: bool = False
    columns: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a source, without its line break; the first line of a file has number 1.

    Attributes:
        number: Line, table row (first = 1), or first line of a paragraph or file.
        data: Bytes of the line; empty where ``reject`` is set.
        reject: Why the line cannot be read at all, or "".
    """

    number: int
    data: bytes
    reject: str = ""


def is_plain_text(path: Path) -> bool:
    """Return whether lines of ``path`` are text themselves and not JSON objects."""
    return path.name.endswith((".txt", ".txt.gz", ".txt.zst"))


class _CountingFile(io.RawIOBase):
    """Read-only file that counts and hashes the bytes as stored on disk."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._file = path.open("rb", buffering=0)
        self.sha256 = hashlib.sha256()
        self.size = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        count = self._file.readinto(buffer) or 0
        self.sha256.update(memoryview(buffer)[:count])
        self.size += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


class SourceReader:
    """Read the lines of one input file in order; a context manager.

    Args:
        path: The file; its name says the format.
        options: Limits and fields.
    """

    def __init__(self, path: Path, options: ReadOptions | None = None) -> None:
        self.path = path
        self._options = options or ReadOptions()
        self._is_table = path.name.endswith(TABLE_SUFFIXES)
        self._raw = _CountingFile(path)
        self._buffered = io.BufferedReader(self._raw, 1 << 17)
        self._num_decompressed = 0
        self._num_lines = 0
        self._table_bytes = 0

    def __enter__(self) -> SourceReader:
        """Return the reader."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the file."""
        self._buffered.close()

    @property
    def num_bytes(self) -> int:
        """Bytes read from the disk so far (for tables in proportion to the rows)."""
        return self._table_bytes if self._is_table else self._raw.size

    @property
    def sha256(self) -> str:
        """SHA-256 of the stored bytes; of the whole file once all lines were read."""
        return hash_file(self.path) if self._is_table else self._raw.sha256.hexdigest()

    def lines(self) -> Iterator[Line]:
        """Yield every line that is not blank.

        Raises:
            DataError: The file is truncated, damaged, of another format, without the column that
                was asked for, or larger than the limits allow.
        """
        if self._is_table:
            yield from self._table_lines()
        elif is_plain_text(self.path) and self._options.text_documents != "line":
            yield from self._joined_lines(by_file=self._options.text_documents == "file")
        else:
            for line in self._text_lines():
                if line.reject or line.data.strip():
                    yield line

    def _text_lines(self) -> Iterator[Line]:
        """Yield every line, blank ones too; a line above the limit is skipped, not collected."""
        limit = self._options.max_line_bytes
        parts: list[bytes] = []
        length = 0
        for block in self._blocks():
            *ended, rest = block.split(b"\n")
            for piece in ended:
                self._num_lines += 1
                length += len(piece)
                if length <= limit and parts:
                    yield Line(self._num_lines, b"".join([*parts, piece]))
                elif length <= limit:
                    yield Line(self._num_lines, piece)
                else:
                    yield self._too_long(self._num_lines, length)
                parts, length = [], 0
            length += len(rest)
            if length <= limit:
                parts.append(rest)
            else:
                parts = []
        if length:
            self._num_lines += 1
            line = Line(self._num_lines, b"".join(parts))
            yield line if length <= limit else self._too_long(self._num_lines, length)

    def _too_long(self, number: int, length: int) -> Line:
        limit = self._options.max_line_bytes
        return Line(number, b"", f"too long ({length} bytes, --max-line-bytes is {limit})")

    def _joined_lines(self, *, by_file: bool) -> Iterator[Line]:
        """Yield paragraphs (runs of lines that are not blank) or the whole file as one line."""
        limit = self._options.max_line_bytes
        first = size = 0
        parts: list[bytes] = []
        for line in self._text_lines():
            is_blank = not line.reject and not line.data.strip()
            if is_blank and (first == 0 or not by_file):
                if first:
                    yield self._joined(first, parts, size)
                first, size, parts = 0, 0, []
                continue
            first = first or line.number
            size += limit + 1 if line.reject else len(line.data) + 1
            if size <= limit + 1:
                parts.append(line.data)
            else:
                parts.clear()
        if first:
            yield self._joined(first, parts, size)

    def _joined(self, first: int, parts: list[bytes], size: int) -> Line:
        if size > self._options.max_line_bytes + 1:
            return self._too_long(first, size - 1)
        return Line(first, b"\n".join(parts))

    def _blocks(self) -> Iterator[bytes]:
        """Yield decompressed blocks; refuse damage and files that grow beyond the limits."""
        name = self.path.name
        if name.endswith(".gz") and (size := self.path.stat().st_size) < _GZIP_MIN_BYTES:
            raise DataError(
                f"{self.path} has {size} bytes, less than an empty gzip file; copy or download it"
                " again."
            )
        stream = self._stream()
        while True:
            try:
                block = stream.read(_BLOCK_BYTES)
            except EOFError as error:
                raise DataError(self._truncated("gzip")) from error
            except (gzip.BadGzipFile, zlib.error) as error:
                raise DataError(
                    f"{self.path} is no intact gzip file after line {self._num_lines} ({error});"
                    " copy or download it again."
                ) from error
            except OSError as error:
                if not name.endswith(".zst") or error.errno is not None:
                    raise
                if "Truncated" in str(error):
                    raise DataError(self._truncated("zstd")) from error
                raise DataError(
                    f"{self.path} is no intact zstd file after line {self._num_lines} ({error});"
                    " copy or download it again."
                ) from error
            if not block:
                return
            self._num_decompressed += len(block)
            self._check_growth()
            yield block

    def _truncated(self, kind: str) -> str:
        return (
            f"{self.path} is a truncated {kind} file (it ends after line {self._num_lines}); copy"
            " or download it again."
        )

    def _stream(self) -> Any:
        if self.path.name.endswith(".gz"):
            return gzip.GzipFile(fileobj=self._buffered)
        if self.path.name.endswith(".zst"):
            import pyarrow as pa

            return pa.CompressedInputStream(pa.PythonFile(self._buffered, mode="r"), "zstd")
        return self._buffered

    def _check_growth(self) -> None:
        options, size = self._options, self._num_decompressed
        if size > options.max_file_bytes:
            raise DataError(
                f"{self.path} holds more than {options.max_file_bytes} bytes once decompressed"
                " (--max-file-bytes); look at the file, or raise the limit if it is sound."
            )
        stored = max(self._raw.size, 1)
        if size > _RATIO_FROM_BYTES and size > options.max_ratio * stored:
            raise DataError(
                f"{self.path} grows {size / stored:.0f} times when decompressed"
                f" ({size} bytes from {stored}, --max-ratio is {options.max_ratio:g}); look at the"
                " file, or raise the limit if it is sound."
            )

    def _table_lines(self) -> Iterator[Line]:
        import pyarrow as pa

        try:
            for record in self._table_rows():
                self._num_lines += 1
                if record is None:
                    yield Line(self._num_lines, b"", "not UTF-8")
                    continue
                data = json.dumps(record, ensure_ascii=False, default=str).encode()
                if len(data) > self._options.max_line_bytes:
                    yield self._too_long(self._num_lines, len(data))
                else:
                    yield Line(self._num_lines, data)
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            kind = "Parquet" if self.path.name.endswith(".parquet") else "Arrow"
            reason = " ".join(str(error).split())[:200]
            raise DataError(
                f"{self.path} is no intact {kind} file after row {self._num_lines} ({reason}); copy"
                " or download it again."
            ) from error

    def _table_rows(self) -> Iterator[dict[str, Any] | None]:
        """Yield rows with the columns that matter; None for a row that is not UTF-8."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        size = self.path.stat().st_size
        if self.path.name.endswith(".parquet"):
            with pq.ParquetFile(self.path) as file:
                columns = self._columns(file.schema_arrow)
                for batch in file.iter_batches(_TABLE_ROWS, columns=columns):
                    yield from _rows(batch)
                    self._table_bytes = size * self._num_lines // max(file.metadata.num_rows, 1)
        else:
            with pa.memory_map(str(self.path)) as mapped:
                batches: Iterator[pa.RecordBatch]
                if mapped.read(6) == b"ARROW1":
                    reader = pa.ipc.open_file(mapped)
                    batches = map(reader.get_batch, range(reader.num_record_batches))
                else:
                    mapped.seek(0)
                    reader = pa.ipc.open_stream(mapped)
                    batches = iter(reader)
                columns = self._columns(reader.schema)
                for batch in batches:
                    table = batch.select(columns)
                    for start in range(0, table.num_rows, _TABLE_ROWS):
                        yield from _rows(table.slice(start, _TABLE_ROWS))
                    self._table_bytes = max(self._table_bytes, min(size, mapped.tell()))
        self._table_bytes = size

    def _columns(self, schema: Any) -> list[str]:
        if self._options.all_columns:
            return list(schema.names)
        if self._options.columns:
            return self._some_columns(list(schema.names))
        wanted = [self._options.text_field, *(["messages"] if self._options.chat else [])]
        found = [name for name in wanted if name in schema.names]
        if not found:
            raise DataError(
                f"{self.path} has no column {' or '.join(map(repr, wanted))}, it has"
                f" {', '.join(map(repr, schema.names[:20]))}; name the column with --text-field."
            )
        kind = str(schema.field(found[0]).type) if found[0] == wanted[0] else "string"
        if "string" not in kind:
            raise DataError(
                f"column {found[0]!r} of {self.path} is {kind}, expected string; name another"
                " column with --text-field."
            )
        return found

    def _some_columns(self, names: list[str]) -> list[str]:
        found = [name for name in self._options.columns if name in names]
        if not found:
            raise DataError(
                f"{self.path} has none of the columns {', '.join(self._options.columns)}, it has"
                f" {', '.join(map(repr, names[:20]))}; rename a column or convert the file."
            )
        return found


def _rows(batch: Any) -> Iterator[dict[str, Any] | None]:
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for index in range(batch.num_rows):
            try:
                row = batch.slice(index, 1).to_pylist()[0]
            except UnicodeDecodeError:
                row = None
            yield row

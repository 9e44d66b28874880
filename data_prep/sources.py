"""Finding input files and reading their lines, with the bytes counted and hashed."""

from __future__ import annotations

import glob
import gzip
import hashlib
import io
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from forgetscale.errors import ConfigError, DataError

SUFFIXES = (".jsonl", ".jsonl.gz")
_SPLIT = re.compile(r"(?:^|_)(clean|noisy)_")
_GZIP_RATIO = 3.5
_GZIP_MIN_BYTES = 20


def find_sources(
    inputs: Sequence[str],
    *,
    language: str | None = None,
    split: str | None = None,
    release: str | None = None,
) -> list[Path]:
    """Return the input files in the order in which they are read.

    Args:
        inputs: Files, folders or glob patterns, in order. A folder stands for its ``.jsonl`` and
            ``.jsonl.gz`` files, sorted by name; with ``language`` it is the root of a MADLAD-400
            copy (it holds ``data/`` or ``data-v1p5/``).
        language: Language tag such as ``am``.
        split: ``clean`` or ``noisy``: keep only these MADLAD-400 shards.
        release: ``v1`` (``data/``) or ``v1p5`` (``data-v1p5/``); None where only one is there.

    Raises:
        DataError: A path is missing, a folder is empty, a pattern matches nothing.
        ConfigError: The choice is not clear, or a file has another form or comes twice.
    """
    if language is not None:
        split = split or "clean"
    elif release is not None:
        raise ConfigError("--release needs --language, which says where to look; add it.")
    found: list[Path] = []
    for text in inputs:
        path = Path(text)
        if path.is_dir():
            folder = path if language is None else _language_folder(path, language, release)
            found += _folder_files(folder, split)
        elif language is not None:
            raise DataError(
                f"input {text} is no folder; with --language give the root of a MADLAD-400 copy,"
                " the folder that holds data/ or data-v1p5/."
            )
        elif split is not None:
            raise ConfigError(
                f"--split chooses among the files of a folder, input {text} is none; give the"
                " folder or leave --split out."
            )
        else:
            found += _matching_files(text)
    seen: set[Path] = set()
    for path in found:
        if not path.name.endswith(SUFFIXES):
            raise ConfigError(
                f"input {path} is not read: expected a name ending in .jsonl or .jsonl.gz;"
                " convert it or name other files."
            )
        if path.resolve() in seen:
            raise ConfigError(f"input {path} is given twice; each file is read once.")
        seen.add(path.resolve())
    return found


def _language_folder(root: Path, language: str, release: str | None) -> Path:
    folders = {"v1": root / "data" / language, "v1p5": root / "data-v1p5" / language}
    present = [name for name, folder in folders.items() if folder.is_dir()]
    if release is not None:
        if release not in present:
            raise DataError(f"{folders[release]} does not exist; check --language and --release.")
        return folders[release]
    if len(present) == 2:
        raise ConfigError(
            f"{root} holds '{language}' in both releases; choose with --release v1 or"
            " --release v1p5."
        )
    if not present:
        raise DataError(
            f"{root} holds no language '{language}': neither {folders['v1']} nor"
            f" {folders['v1p5']} exists; check --input and --language."
        )
    return folders[present[0]]


def _folder_files(folder: Path, split: str | None) -> list[Path]:
    files = sorted(path for path in folder.iterdir() if path.name.endswith(SUFFIXES))
    if not files:
        raise DataError(
            f"input folder {folder} holds no .jsonl or .jsonl.gz file; check the path, or use"
            " --language for the root of a MADLAD-400 copy."
        )
    splits = {path: _SPLIT.search(path.name) for path in files}
    names = {match[1] for match in splits.values() if match}
    if split is None:
        if len(names) == 2:
            raise ConfigError(
                f"input folder {folder} holds clean and noisy shards; choose with --split clean"
                " or --split noisy."
            )
        return files
    chosen = [path for path, match in splits.items() if match and match[1] == split]
    if not chosen:
        raise DataError(f"input folder {folder} holds no '{split}' shard; check --split.")
    return chosen


def _matching_files(pattern: str) -> list[Path]:
    path = Path(pattern)
    if path.is_file():
        return [path]
    found = [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]
    files = [path for path in found if path.is_file()]
    if not files:
        raise DataError(f"input {pattern} does not exist and matches no file; check the path.")
    return files


def estimate_text_bytes(paths: Sequence[Path]) -> int:
    """Return about how many bytes the files hold once decompressed."""
    return sum(
        int(path.stat().st_size * (_GZIP_RATIO if path.name.endswith(".gz") else 1))
        for path in paths
    )


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


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a source, without its line break; the first line of a file has number 1."""

    number: int
    data: bytes


class SourceReader:
    """Read the lines of one input file in order; a context manager.

    Attributes:
        num_bytes: Bytes read from the disk so far.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._raw = _CountingFile(path)
        self._buffered = io.BufferedReader(self._raw, 1 << 17)
        self._is_gzip = path.name.endswith(".gz")

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
        """Bytes read from the disk so far."""
        return self._raw.size

    @property
    def sha256(self) -> str:
        """SHA-256 of the stored bytes; of the whole file once all lines were read."""
        return self._raw.sha256.hexdigest()

    def lines(self) -> Iterator[Line]:
        """Yield every line that is not blank.

        Raises:
            DataError: The gzip stream is truncated or damaged.
        """
        if self._is_gzip and (size := self.path.stat().st_size) < _GZIP_MIN_BYTES:
            raise DataError(
                f"{self.path} has {size} bytes, less than an empty gzip file; copy or download it"
                " again."
            )
        stream = gzip.GzipFile(fileobj=self._buffered) if self._is_gzip else self._buffered
        number = 0
        try:
            for data in stream:
                number += 1
                if data.strip():
                    yield Line(number, data)
        except EOFError as error:
            raise DataError(
                f"{self.path} is a truncated gzip file (it ends after line {number}); copy or"
                " download it again."
            ) from error
        except (gzip.BadGzipFile, zlib.error) as error:
            raise DataError(
                f"{self.path} is no intact gzip file after line {number} ({error}); copy or"
                " download it again."
            ) from error

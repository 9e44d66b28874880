"""``fertility``: how many tokens a tokenizer spends on each language."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import regex
from jaxtyping import Bool

from data_prep.encoding import Encoder, TokenizerSpec, load_tokenizer
from data_prep.sources import find_sources
from data_prep.texts import read_texts
from forgetscale.data import tokenizer_hash
from forgetscale.errors import ConfigError, DataError

WORD = regex.compile(
    r"[\p{L}\p{N}][\p{L}\p{M}\p{N}\u200c\u200d]*(?:['\u2019]\p{L}[\p{L}\p{M}\u200c\u200d]*)*"
)
_BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_BATCH = 64


@dataclass(frozen=True, slots=True)
class Fertility:
    """What one tokenizer does to the text of one language."""

    language: str
    tokenizer: str
    documents: int
    words: int
    text_bytes: int
    tokens: int
    byte_tokens: int
    """Tokens that hold less than a whole character."""
    unknown_tokens: int

    def shares(self) -> dict[str, float]:
        """Return the ratios that the report shows."""
        return {
            "tokens_per_word": self.tokens / max(1, self.words),
            "tokens_per_byte": self.tokens / self.text_bytes,
            "byte_share": self.byte_tokens / self.tokens,
            "unknown_share": self.unknown_tokens / self.tokens,
        }


def byte_level_alphabet() -> dict[str, int]:
    """Return the byte behind each character of a byte-level vocabulary.

    Source:
        openai/gpt-2, ``bytes_to_unicode``: printable Latin-1 characters stand for themselves, the
        other bytes for U+0100 and on.
    """
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {
        chr(256 + place): byte for place, byte in enumerate(others)
    }


def is_byte_level(tokenizer: Any) -> bool:
    """Return whether pieces are spelled in the byte-level alphabet."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return False
    decoder = json.loads(backend.to_str())["decoder"] or {}
    return "ByteLevel" in (part["type"] for part in (decoder, *decoder.get("decoders", ())))


def byte_tokens(tokenizer: Any) -> Bool[np.ndarray, " vocab"]:
    """Return which ids hold less than a whole character.

    Byte pieces (``<0x0A>``) of vocabularies with byte fallback, and pieces of byte-level
    vocabularies whose bytes are no complete UTF-8.

    Args:
        tokenizer: A transformers tokenizer.
    """
    vocabulary = tokenizer.get_vocab()
    found = np.zeros(max(vocabulary.values()) + 1, dtype=bool)
    byte_level = is_byte_level(tokenizer)
    alphabet = byte_level_alphabet()
    added = tokenizer.added_tokens_decoder
    for piece, number in vocabulary.items():
        if number in added:
            continue
        if not byte_level:
            found[number] = _BYTE_PIECE.fullmatch(piece) is not None
            continue
        try:
            bytes(alphabet[character] for character in piece).decode("utf-8")
        except UnicodeDecodeError:
            found[number] = True
    return found


def measure(language: str, paths: Sequence[Path], directory: Path, name: str) -> Fertility:
    """Tokenise all documents of some files and count.

    Args:
        language: Name in the report.
        paths: Input files.
        directory: Tokenizer folder.
        name: Name of the tokenizer in the report.

    Raises:
        DataError: The files hold no document, or one of them is damaged.
    """
    if directory.is_file():
        raise ConfigError(
            f"fertility: --tokenizer {directory} is a file; give a folder AutoTokenizer loads."
        )
    encoder = Encoder(TokenizerSpec(directory))
    in_bytes = byte_tokens(encoder.tokenizer)
    counts = np.zeros(len(in_bytes), dtype=np.int64)
    documents = words = size = 0
    texts = read_texts(paths)
    while part := list(itertools.islice(texts, _BATCH)):
        for ids in encoder(part, special_as_text=True):
            counts += np.bincount(np.asarray(ids, dtype=np.int64), minlength=len(counts))
        documents += len(part)
        size += sum(len(text.encode("utf-8")) for text in part)
        words += sum(1 for text in part for _ in WORD.finditer(text))
    if not documents:
        raise DataError(f"the input of '{language}' holds no document; check --input.")
    unknown = encoder.tokenizer.unk_token_id
    return Fertility(
        language=language,
        tokenizer=name,
        documents=documents,
        words=words,
        text_bytes=size,
        tokens=int(counts.sum()),
        byte_tokens=int(counts[in_bytes].sum()),
        unknown_tokens=0 if unknown is None else int(counts[unknown]),
    )


def find_languages(inputs: Sequence[str]) -> dict[str, list[Path]]:
    """Return the files of each language.

    Args:
        inputs: ``NAME=PATH_OR_GLOB``, the root of a MADLAD-400 copy (all its languages, release v1
            where both are there), or a path named after its folder or file.

    Raises:
        ConfigError: A name comes twice.
        DataError: A path is missing.
    """
    found: dict[str, list[Path]] = {}
    for text in inputs:
        name, separator, rest = text.partition("=")
        if separator and not Path(text).exists():
            entries = {name: find_sources([rest])}
        elif (folders := _madlad_languages(Path(text))) is not None:
            entries = {tag: find_sources([text], language=tag, release=r) for tag, r in folders}
        else:
            path = Path(text)
            entries = {path.name.split(".")[0] or text: find_sources([text])}
        for key, paths in entries.items():
            if key in found:
                raise ConfigError(f"--input names '{key}' twice; write NAME=PATH to tell apart.")
            found[key] = paths
    return found


def _madlad_languages(root: Path) -> list[tuple[str, str]] | None:
    """Return (language, release) of a MADLAD-400 copy, or None if it is none."""
    releases: dict[str, str] = {}
    for folder, release in (("data-v1p5", "v1p5"), ("data", "v1")):
        if (root / folder).is_dir():
            releases |= {path.name: release for path in (root / folder).iterdir() if path.is_dir()}
    return sorted(releases.items()) or None


def compare(inputs: Sequence[str], tokenizers: Sequence[Path]) -> dict[str, Any]:
    """Measure each tokenizer on each language.

    Returns:
        What ``--output FILE.json`` holds.
    """
    languages = find_languages(inputs)
    names = [directory.name or str(directory) for directory in tokenizers]
    if len(set(names)) < len(names):
        names = [str(directory) for directory in tokenizers]
    described = [
        {
            "name": name,
            "path": str(directory),
            "sha256": tokenizer_hash(directory),
            "vocabulary": len(load_tokenizer(directory)),
        }
        for name, directory in zip(names, tokenizers, strict=True)
    ]
    rows = [
        measure(language, paths, directory, name)
        for language, paths in languages.items()
        for name, directory in zip(names, tokenizers, strict=True)
    ]
    return {
        "tokenizers": described,
        "inputs": {
            language: [str(path) for path in paths] for language, paths in languages.items()
        },
        "fertility": [asdict(row) | row.shares() for row in rows],
    }

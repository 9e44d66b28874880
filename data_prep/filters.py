"""Which documents are left out, and why: length, script, overlap with evaluation texts.

Everything here is a pure function of one document, so the outcome does not depend on how the work
is divided. A word is a run of letters, marks and digits; in scripts written without spaces each
letter counts as a word.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import regex
import xxhash
from jaxtyping import UInt64

from forgetscale.errors import ConfigError

_NO_SPACES = "".join(
    rf"\p{{Script={name}}}"
    for name in ("Han", "Hiragana", "Katakana", "Thai", "Lao", "Khmer", "Myanmar")
)
_WORD = regex.compile(rf"[{_NO_SPACES}]|[\p{{L}}\p{{M}}\p{{N}}--[{_NO_SPACES}]]+", regex.V1)
_LETTERS = regex.compile(r"[[\p{L}\p{M}]--[\p{Script=Common}\p{Script=Inherited}]]+", regex.V1)
_BASE = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, slots=True, kw_only=True)
class FilterOptions:
    """What a document must be; None: no condition.

    Attributes:
        min_characters: Least characters of the text.
        max_characters: Most characters.
        min_words: Least words.
        max_words: Most words.
        script: Unicode script such as ``Ethiopic`` or ``Deva``.
        min_script_fraction: Least share of the letters that belong to it, 0..1.
        ngram: Words of a sequence that must not be shared with an evaluation text, >= 1.
    """

    min_characters: int | None = None
    max_characters: int | None = None
    min_words: int | None = None
    max_words: int | None = None
    script: str | None = None
    min_script_fraction: float = 0.5
    ngram: int = 13


def words_of(text: str) -> list[str]:
    """Return the words of ``text``, case folded."""
    found: list[str] = _WORD.findall(text.casefold())
    return found


def script_pattern(name: str) -> Any:
    """Return a pattern of runs of letters of a Unicode script.

    Raises:
        ConfigError: There is no such script.
    """
    try:
        return regex.compile(rf"[[\p{{L}}\p{{M}}]&&\p{{Script_Extensions={name}}}]+", regex.V1)
    except regex.error as error:
        raise ConfigError(
            f"--script {name} is no Unicode script; give a name such as Latin, Ethiopic,"
            " Devanagari, Cyrillic or its code such as Latn, Ethi, Deva, Cyrl."
        ) from error


def script_fraction(text: str, pattern: Any) -> float:
    """Return the share of letters of ``text`` that match ``pattern``; 0 without letters."""
    letters = sum(map(len, _LETTERS.findall(text)))
    return sum(map(len, pattern.findall(text))) / letters if letters else 0.0


class _WordHashes(dict[str, int]):
    """Hash of each word, remembered; emptied when it grows large."""

    def __missing__(self, word: str) -> int:
        if len(self) > 1 << 20:
            self.clear()
        value = xxhash.xxh3_64_intdigest(word.encode())
        self[word] = value
        return value


_word_hashes = _WordHashes()


def ngram_hashes(words: list[str], length: int) -> UInt64[np.ndarray, " ngrams"]:
    """Return a 64-bit hash of every run of ``length`` words; none if there are fewer words."""
    count = len(words) - length + 1
    if count < 1:
        return np.empty(0, np.uint64)
    hashes = np.fromiter((_word_hashes[word] for word in words), np.uint64, len(words))
    found = np.zeros(count, np.uint64)
    for offset in range(length):
        found = found * _BASE + hashes[offset : offset + count]
    return found


def texts_of(value: Any) -> Iterator[str]:
    """Yield every string inside a JSON value: questions, answers, messages."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from texts_of(part)
    elif isinstance(value, list):
        for part in value:
            yield from texts_of(part)


def evaluation_ngrams(texts: Iterable[str], length: int) -> tuple[np.ndarray, int, int]:
    """Return sorted hashes of all n-grams, the number of texts, and how many are too short."""
    found = [np.empty(0, np.uint64)]
    num_texts = num_short = 0
    for text in texts:
        num_texts += 1
        hashes = ngram_hashes(words_of(text), length)
        num_short += not len(hashes)
        found.append(hashes)
    return np.unique(np.concatenate(found)), num_texts, num_short


class DocumentFilter:
    """Says why a document is left out.

    Args:
        options: Conditions.
        evaluation: File of sorted n-gram hashes (``.npy``), or None.
    """

    def __init__(self, options: FilterOptions, evaluation: Path | None = None) -> None:
        self._options = options
        self._pattern = script_pattern(options.script) if options.script else None
        self._hashes = np.load(evaluation, mmap_mode="r") if evaluation is not None else None
        counts_words = options.min_words is not None or options.max_words is not None
        self._needs_words = counts_words or self._hashes is not None

    def reason_to_drop(self, text: str) -> str | None:
        """Return the name of the first condition that ``text`` fails, or None."""
        options = self._options
        if (
            reason := _outside(len(text), options.min_characters, options.max_characters)
        ) is not None:
            return f"{reason}_characters"
        words = words_of(text) if self._needs_words else []
        if (reason := _outside(len(words), options.min_words, options.max_words)) is not None:
            return f"{reason}_words"
        if self._pattern is not None:
            if script_fraction(text, self._pattern) < options.min_script_fraction:
                return "other_script"
        if self._hashes is not None and len(self._hashes):
            hashes = ngram_hashes(words, options.ngram)
            places = np.searchsorted(self._hashes, hashes)
            places[places == len(self._hashes)] = 0
            if bool((self._hashes[places] == hashes).any()):
                return "evaluation_overlap"
        return None


def _outside(value: int, least: int | None, most: int | None) -> str | None:
    if least is not None and value < least:
        return "too_few"
    return "too_many" if most is not None and value > most else None

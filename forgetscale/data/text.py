"""Words, scripts and word sequences of a text: what filters and duplicates are decided by.

A word is a run of letters, marks and digits; in scripts written without spaces each letter counts
as a word.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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


def words_of(text: str) -> list[str]:
    """Return the words of ``text``, case folded."""
    found: list[str] = _WORD.findall(text.casefold())
    return found


def script_pattern(name: str, option: str = "script") -> Any:
    """Return a pattern of runs of letters of a Unicode script.

    Args:
        name: Such as ``Ethiopic`` or ``Deva``.
        option: What the user calls it.

    Raises:
        ConfigError: There is no such script.
    """
    try:
        return regex.compile(rf"[[\p{{L}}\p{{M}}]&&\p{{Script_Extensions={name}}}]+", regex.V1)
    except regex.error as error:
        raise ConfigError(
            f"{option} {name} is no Unicode script; give a name such as Latin, Ethiopic,"
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

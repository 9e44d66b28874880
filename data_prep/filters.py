"""Which documents are left out, and why: length, script, overlap with evaluation texts.

Everything here is a pure function of one document, so the outcome does not depend on how the work
is divided.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from forgetscale.data.text import ngram_hashes, script_fraction, script_pattern, words_of


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

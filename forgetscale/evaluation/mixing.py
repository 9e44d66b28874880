"""How much of an answer is in another language: by answer, by line and by word.

Language identification of a whole answer does not see a single inserted clause, so lines and words
are looked at too. Three sources: ``pycld2`` (spans per language), ``py3langid`` (a second opinion
on the whole answer), and the scripts of the letters, which need no model and are exact where the
two languages are written differently.
"""

from __future__ import annotations

import importlib.util
import re
import unicodedata
from dataclasses import dataclass
from typing import Any

from forgetscale.errors import ConfigError

MIXED_BELOW = 0.9
"""An answer is mixed if less than this share of it is in its language (arXiv:2512.04844)."""
_SCRIPTS = {"am": "ETHIOPIC", "ne": "DEVANAGARI", "hi": "DEVANAGARI", "ky": "CYRILLIC"}
_SCRIPTS |= {"ru": "CYRILLIC", "zh": "CJK", "el": "GREEK", "ar": "ARABIC", "ti": "ETHIOPIC"}
_WORD = re.compile(r"\w+")
METRICS = (
    "answers_mixed",
    "answers_mixed_langid",
    "lines_mixed",
    "words_mixed",
    "letters_other_script",
)


@dataclass(frozen=True, slots=True)
class Mixing:
    """One answer; counts, so that shares over many answers are sums over sums."""

    mixed: bool
    mixed_langid: bool
    lines: int
    lines_mixed: int
    words: int
    words_mixed: int
    letters: int
    letters_other: int

    def pair(self, metric: str) -> tuple[float, float]:
        """Return counted and all, for one of ``METRICS``."""
        return {
            "answers_mixed": (float(self.mixed), 1.0),
            "answers_mixed_langid": (float(self.mixed_langid), 1.0),
            "lines_mixed": (float(self.lines_mixed), float(self.lines)),
            "words_mixed": (float(self.words_mixed), float(self.words)),
            "letters_other_script": (float(self.letters_other), float(self.letters)),
        }[metric]


def require_identifiers() -> None:
    """Check that the two packages are there.

    Raises:
        ConfigError: One is not.
    """
    for name in ("pycld2", "py3langid"):
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"tasks of kind language_mixing need the package {name}, which is not installed;"
                " run pip install 'forgetscale[eval]'."
            )


def script_of(letter: str) -> str:
    """Return the script of a letter, by the first word of its Unicode name."""
    return unicodedata.name(letter, "UNKNOWN").split()[0]


def script_counts(text: str, language: str) -> tuple[int, int]:
    """Return all letters of a text and those not written in the script of a language.

    Args:
        text: Any text.
        language: Two-letter code; those that are not known here are taken as Latin.
    """
    wanted = _SCRIPTS.get(language, "LATIN")
    letters = [letter for letter in text if letter.isalpha()]
    return len(letters), sum(script_of(letter) != wanted for letter in letters)


def _detect(text: str) -> tuple[str, float, tuple[Any, ...]]:
    """Return language, its share of the text, and spans ``(byte, bytes, name, code)``."""
    import pycld2

    printable = "".join(c for c in text if c.isprintable() or c.isspace())
    _, _, details, spans = pycld2.detect(printable, returnVectors=True)
    return str(details[0][1]), details[0][2] / 100.0, spans


def _words(text: str, language: str) -> tuple[int, int]:
    """Count words, and those of another script or inside a span of another known language."""
    printable = "".join(c for c in text if c.isprintable() or c.isspace())
    other = [
        (start, start + length)
        for start, length, _, code in _detect(printable)[2]
        if code not in (language, "un")
    ]
    words = mixed = 0
    for found in _WORD.finditer(printable):
        place = len(printable[: found.start()].encode())
        letters, foreign = script_counts(found[0], language)
        words += 1
        mixed += 2 * foreign > letters or any(low <= place < high for low, high in other)
    return words, mixed


def measure_mixing(answer: str, language: str) -> Mixing:
    """Measure one answer.

    Text too short to be identified counts by its script alone.

    Args:
        answer: What the model said.
        language: Two-letter code of the language it should be in.

    Source:
        arXiv:2512.04844 counts an answer as mixed if its top language is another or its share is
        below 0.9, by GlotLID restricted to two languages, which needs a download; lines, words and
        scripts are ours.
    """
    import py3langid

    letters, foreign = script_counts(answer, language)
    found, share, _ = _detect(answer)
    unsure = found == "un"
    mixed = bool(foreign) if unsure else found != language or share < MIXED_BELOW
    lines = [line for line in answer.splitlines() if any(c.isalpha() for c in line)]
    lines_mixed = 0
    for line in lines:
        code = _detect(line)[0]
        count, other = script_counts(line, language)
        lines_mixed += 2 * other > count if code == "un" else code != language
    words, words_mixed = _words(answer, language)
    second = py3langid.classify(answer)[0] if letters else language
    return Mixing(
        mixed=mixed,
        mixed_langid=second != language,
        lines=len(lines),
        lines_mixed=lines_mixed,
        words=words,
        words_mixed=words_mixed,
        letters=letters,
        letters_other=foreign,
    )

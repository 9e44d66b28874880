"""Checks of an answer that a program can decide: the length, the words, their order.

A check is a small mapping with a ``kind`` and its arguments, stored in task rows (``"checks"``).
Words are what stands between white space, without punctuation at either end; case counts.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any

from forgetscale.ops.format_checks import FORMAT_CHECKS

Check = Mapping[str, Any]
_PUNCTUATION = ".,;:?!\"'()"


def split_words(text: str) -> list[str]:
    """Return the words of ``text`` in order, without punctuation at either end of each."""
    stripped = (word.strip(_PUNCTUATION) for word in text.split())
    return [word for word in stripped if word]


def _equals(check: Check, answer: str) -> bool:
    return bool(answer.strip() == check["text"])


def _one_of(check: Check, answer: str) -> bool:
    return answer.strip() in check["options"]


def _starts_with(check: Check, answer: str) -> bool:
    wanted = split_words(check["text"])
    return split_words(answer)[: len(wanted)] == wanted


def _ends_with(check: Check, answer: str) -> bool:
    return bool(answer.strip().endswith(check["text"]))


def _contains(check: Check, answer: str) -> bool:
    return set(check["words"]) <= set(split_words(answer))


def _excludes(check: Check, answer: str) -> bool:
    return not set(check["words"]) & set(split_words(answer))


def _num_words(check: Check, answer: str) -> bool:
    count = len(split_words(answer))
    return bool(check["min"] <= count <= check["max"])


def _num_sentences(check: Check, answer: str) -> bool:
    ends = sum(answer.count(mark) for mark in ".?!")
    return bool(check["min"] <= ends <= check["max"])


def _sequence(check: Check, answer: str) -> bool:
    return bool(split_words(answer) == list(check["words"]))


def _words_from(check: Check, answer: str) -> bool:
    words = split_words(answer)
    return bool(words) and set(words) <= set(check["words"]) and len(set(words)) == len(words)


def _uppercase(check: Check, answer: str) -> bool:
    return answer.isupper()


CHECKS: Mapping[str, Callable[[Check, str], bool]] = {
    "equals": _equals,
    "one_of": _one_of,
    "starts_with": _starts_with,
    "ends_with": _ends_with,
    "contains": _contains,
    "excludes": _excludes,
    "num_words": _num_words,
    "num_sentences": _num_sentences,
    "sequence": _sequence,
    "words_from": _words_from,
    "uppercase": _uppercase,
    **FORMAT_CHECKS,
}
"""Kind of check -> function of the check and the answer."""


def passes(check: Check, answer: str) -> bool:
    """Say whether ``answer`` passes one check.

    Args:
        check: ``kind`` and the arguments of that kind:
            ``equals`` (text), ``one_of`` (options), ``starts_with`` (text; whole words),
            ``ends_with`` (text), ``contains`` / ``excludes`` (words: all of them / none of them),
            ``num_words`` / ``num_sentences`` (min, max; both included),
            ``sequence`` (words: exactly these, in this order),
            ``words_from`` (words: at least one word, each of this list, none twice),
            ``uppercase`` (no argument); and those of ``format_checks``: ``keyword_count`` (word),
            ``letter_count`` (letter), ``num_paragraphs``, ``num_bullets``, ``num_highlights``,
            ``num_placeholders``, ``num_capital_words`` (each with min, max or both),
            ``lowercase``, ``no_comma``, ``quoted``, ``title``, ``json``, ``two_answers`` (no
            argument) and ``postscript`` (marker, else ``P.S.``).
        answer: Text of the answer; white space at its ends is ignored.

    Raises:
        ValueError: The kind is unknown or an argument of it is missing.
    """
    kind = check.get("kind")
    function = CHECKS.get(str(kind))
    if function is None:
        near = difflib.get_close_matches(str(kind), CHECKS, n=1)
        hint = f"nearest: {near[0]!r}" if near else f"known: {', '.join(CHECKS)}"
        raise ValueError(f"unknown kind of check {kind!r} ({hint}); correct the task row")
    try:
        return function(check, answer)
    except KeyError as error:
        raise ValueError(
            f"check of kind {kind!r} has no argument {error}; complete the task row"
        ) from error


def passes_all(checks: list[Check], answer: str) -> bool:
    """Say whether ``answer`` passes every check of a non-empty list."""
    if not checks:
        raise ValueError("the list of checks is empty, so nothing is measured; add a check")
    return all(passes(check, answer) for check in checks)

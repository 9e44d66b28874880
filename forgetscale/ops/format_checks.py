"""More checks of an answer that a program can decide: the kinds of instruction IFEval uses.

Written anew from the published list of instruction kinds (arXiv:2311.07911), without its helpers
that download tokenizer data: sentences are counted by end marks, words by white space. They are
stricter than the published checkers in places (a numbered line is a bullet here, an empty highlight
none); tasks of kind ``ifeval`` give the published verdicts, see ``evaluation.ifeval``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

Check = Mapping[str, Any]
_BULLET = re.compile(r"^\s*(?:[*-]|\d+\.)\s+\S", re.MULTILINE)
_HIGHLIGHT = re.compile(r"\*\*[^\n*]+\*\*|\*[^\n*]+\*")
_PLACEHOLDER = re.compile(r"\[[^\[\]\n]+\]")
_TITLE = re.compile(r"<<[^<>\n]+>>")
_FENCE = re.compile(r"^```\w*\n(.*)\n```$", re.DOTALL)
_RULE = re.compile(r"^\s*\*\*\*\s*$", re.MULTILINE)
_SEPARATOR = "******"


def _within(count: int, check: Check) -> bool:
    """Say whether a count lies between ``min`` and ``max``; a missing end is open."""
    return bool(check.get("min", 0) <= count <= check.get("max", count))


def _keyword_count(check: Check, answer: str) -> bool:
    word = re.escape(str(check["word"]))
    return _within(len(re.findall(rf"\b{word}\b", answer, re.IGNORECASE)), check)


def _letter_count(check: Check, answer: str) -> bool:
    return _within(answer.casefold().count(str(check["letter"]).casefold()), check)


def _num_paragraphs(check: Check, answer: str) -> bool:
    parts = _RULE.split(answer) if _RULE.search(answer) else re.split(r"\n\s*\n", answer)
    return _within(sum(bool(part.strip()) for part in parts), check)


def _num_bullets(check: Check, answer: str) -> bool:
    return _within(len(_BULLET.findall(answer)), check)


def _num_highlights(check: Check, answer: str) -> bool:
    return _within(len(_HIGHLIGHT.findall(answer)), check)


def _num_placeholders(check: Check, answer: str) -> bool:
    return _within(len(_PLACEHOLDER.findall(answer)), check)


def _num_capital_words(check: Check, answer: str) -> bool:
    words = re.findall(r"\b\w+\b", answer)
    return _within(sum(word.isupper() for word in words), check)


def _lowercase(check: Check, answer: str) -> bool:
    return answer.islower()


def _no_comma(check: Check, answer: str) -> bool:
    return "," not in answer


def _quoted(check: Check, answer: str) -> bool:
    text = answer.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


def _title(check: Check, answer: str) -> bool:
    return bool(_TITLE.search(answer))


def _postscript(check: Check, answer: str) -> bool:
    marker = str(check.get("marker", "P.S."))
    return any(line.strip().startswith(marker) for line in answer.splitlines())


def _is_json(check: Check, answer: str) -> bool:
    text = answer.strip()
    fenced = _FENCE.match(text)
    try:
        json.loads(fenced[1] if fenced else text)
    except ValueError:
        return False
    return True


def _two_answers(check: Check, answer: str) -> bool:
    parts = [part.strip() for part in answer.split(_SEPARATOR)]
    return len(parts) == 2 and all(parts) and parts[0] != parts[1]


FORMAT_CHECKS: Mapping[str, Callable[[Check, str], bool]] = {
    "keyword_count": _keyword_count,
    "letter_count": _letter_count,
    "num_paragraphs": _num_paragraphs,
    "num_bullets": _num_bullets,
    "num_highlights": _num_highlights,
    "num_placeholders": _num_placeholders,
    "num_capital_words": _num_capital_words,
    "lowercase": _lowercase,
    "no_comma": _no_comma,
    "quoted": _quoted,
    "title": _title,
    "postscript": _postscript,
    "json": _is_json,
    "two_answers": _two_answers,
}
"""Kind of check -> function of the check and the answer; counts take ``min`` and ``max``."""

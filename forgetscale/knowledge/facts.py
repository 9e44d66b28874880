"""Facts to ask for, where their answers may stand in a text, and which questions they came from."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from forgetscale.errors import ConfigError, DataError

Rule = Literal["words", "substring"]
SUBJECT = "[X]"
IN_DOMAIN = ("P17", "P19", "P20", "P36", "P69", "P131", "P159", "P276", "P495", "P740")
"""Relations about places, the paper's training set (arXiv:2509.16596, section 3)."""
QUESTIONS: Mapping[str, str] = {
    "P17": "Which country is [X] located in?",
    "P19": "Where was [X] born?",
    "P20": "Where did [X] die?",
    "P26": "Who is [X] married to?",
    "P36": "What is the capital of [X]?",
    "P40": "Who is [X]'s child?",
    "P50": "Who is the author of [X]?",
    "P69": "Where was [X] educated?",
    "P106": "What kind of work does [X] do?",
    "P112": "Who founded [X]?",
    "P127": "Who owns [X]?",
    "P131": "Where is [X] located?",
    "P136": "What type of music does [X] play?",
    "P159": "Where is the headquarter of [X]?",
    "P170": "Who was [X] created by?",
    "P175": "Who performed [X]?",
    "P176": "Which company is [X] produced by?",
    "P264": "What music label is [X] represented by?",
    "P276": "Where is [X] located?",
    "P407": "Which language was [X] written in?",
    "P413": "What position does [X] play?",
    "P495": "Which country was [X] created in?",
    "P740": "Where was [X] founded?",
    "P800": "What is [X] famous for?",
}
"""Wording of ENTITYQUESTIONS by relation; it leads from a question to its subject."""


@dataclass(frozen=True, slots=True)
class Fact:
    """A subject, a relation, and what may stand for the object."""

    id: str
    subject: str
    relation: str
    answers: tuple[str, ...]
    """The object first, then its aliases."""
    question: str = ""


def _text(value: object, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where} must be a non-empty text, got {value!r}; correct the file.")
    return value


def read_facts(path: Path) -> list[Fact]:
    """Read facts from JSON lines: ``subject``, ``relation``, ``object``, optional ``aliases``.

    Raises:
        DataError: The file is missing or a line is malformed; the message names it.
    """
    if not path.is_file():
        raise DataError(f"{path} does not exist; --facts names a file of JSON lines or a folder.")
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
            names = [row["object"], *row.get("aliases", [])]
            subject, relation = row["subject"], row["relation"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{where} is no fact with subject, relation and object ({error!r})."
            ) from error
        answers = tuple(_text(name, f"{where}: an answer") for name in names)
        found.append(
            Fact(
                str(row.get("id", number)),
                _text(subject, f"{where}: subject"),
                _text(relation, f"{where}: relation"),
                answers,
                str(row.get("question", "")),
            )
        )
    if not found:
        raise DataError(f"{path} holds no facts.")
    return found


def read_entity_questions(
    folder: Path, split: str = "test", questions: Mapping[str, str] = QUESTIONS
) -> list[Fact]:
    """Read the files ``P*.SPLIT.json`` of ENTITYQUESTIONS.

    Args:
        folder: Folder with the files of one split, or with a folder of the split's name.
        split: ``train``, ``dev`` or ``test``.
        questions: Relation -> wording; relations without one are left out.

    Raises:
        DataError: There are no such files, or a record or question is not as it must be.
    """
    inner = folder / split
    paths = sorted((inner if inner.is_dir() else folder).glob(f"P*.{split}.json"))
    paths = [path for path in paths if path.name.split(".")[0] in questions]
    if not paths:
        raise DataError(f"{folder} holds no file P*.{split}.json of ENTITYQUESTIONS.")
    found = []
    for path in paths:
        relation = path.name.split(".")[0]
        before, after = questions[relation].split(SUBJECT)
        try:
            rows = [(row["question"], row["answers"]) for row in json.loads(path.read_bytes())]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is not in the form of ENTITYQUESTIONS ({error!r}).") from error
        for number, (question, answers) in enumerate(rows):
            if not (question.startswith(before) and question.endswith(after) and answers):
                raise DataError(
                    f"{path}, record {number}: {question!r} is not worded as"
                    f" {questions[relation]!r}, or has no answer."
                )
            subject = question[len(before) : len(question) - len(after)]
            found.append(
                Fact(f"{relation}/{split}/{number}", subject, relation, tuple(answers), question)
            )
    return found


def read_templates(path: Path, facts: Sequence[Fact]) -> dict[str, list[str]]:
    """Read relation -> openings that the object would complete, ``[X]`` standing for the subject.

    Raises:
        ConfigError: A relation of the facts has none, or relations have different numbers.
        DataError: The file is malformed.
    """
    try:
        content = json.loads(path.read_bytes())
        found = {str(name): [str(text) for text in texts] for name, texts in content.items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise DataError(f"{path} is no JSON object of relation: [templates] ({error}).") from error
    for relation in sorted({fact.relation for fact in facts}):
        texts = found.get(relation, [])
        if not texts:
            raise ConfigError(f"{path} has no templates for relation {relation!r}; add some.")
        for text in texts:
            if text.count(SUBJECT) != 1:
                raise ConfigError(f"{path}: template {text!r} must hold {SUBJECT} once.")
    return found


_END = re.compile(r"[.!?](?=\s|$)|\n")


def follows_format(text: str, opening: str, subject: str, *, stopped: bool) -> bool:
    """Say whether a continuation is an answer at all, right or wrong.

    The answer is the text up to the first line break, full stop, exclamation or question mark
    (before white space or the end), or the end that the model set itself. It follows the format if

    1. there is such an end: the text was not cut in the middle of its first sentence;
    2. it holds a letter or digit;
    3. it does not say the question again: neither does it hold the opening, nor is it the subject
       alone.

    Args:
        text: A continuation, special tokens removed.
        opening: What it continues.
        subject: Subject of the fact.
        stopped: Whether the model ended it by itself.

    Source:
        our rule; the paper (arXiv:2509.16596) does not separate wrong answers from no answers.
    """
    end = _END.search(text.lstrip())
    if end is None and not stopped:
        return False
    answer = normalise(text.lstrip()[: end.start() if end else None], fold_case=True)
    if not re.search(r"\w", answer):
        return False
    said = normalise(opening, fold_case=True)
    return said not in answer and answer != normalise(subject, fold_case=True)


def normalise(text: str, *, fold_case: bool) -> str:
    """Return text in one Unicode form, with single spaces, and without case if asked."""
    text = " ".join(unicodedata.normalize("NFKC", text).split())
    return text.casefold() if fold_case else text


def holds_answer(
    text: str, answers: Sequence[str], *, rule: Rule = "words", fold_case: bool = True
) -> bool:
    """Say whether a text holds one of the answers.

    Args:
        text: A continuation.
        answers: The object and its aliases.
        rule: ``words`` asks for whole words ("Niger" is not in "Nigeria"); ``substring`` is the
            paper's rule.
        fold_case: Ignore case.
    """
    text = normalise(text, fold_case=fold_case)
    for answer in answers:
        wanted = normalise(answer, fold_case=fold_case)
        if rule == "substring":
            if wanted in text:
                return True
        elif re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", text):
            return True
    return False

"""Tasks on disk: chat questions as JSON lines, token sets for perplexity, both with a hash.

A task folder holds ``NAME.jsonl`` or ``NAME.parquet`` for chat tasks (with ``NAME.yaml`` beside it
where its answers are decoded in a way of their own, see ``decoding``), ``perplexity/NAME/`` token
sets, ``lm_eval/NAME.yaml`` for tasks of lm-evaluation-harness, and, for code-mixing,
``vocabulary.json`` (in the folder or beside it).
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from forgetscale.artifact import canonical_json, hash_bytes
from forgetscale.errors import DataError
from forgetscale.evaluation.decoding import TaskDecoding, read_task_decoding
from forgetscale.evaluation.harness.files import harness_names, is_harness
from forgetscale.evaluation.ifeval import PUBLISHED_KEYS, require_instruction, row_of_published
from forgetscale.ops.checks import passes

KINDS = (
    *("exact", "check", "refusal", "no_refusal", "code_mixing"),
    *("chrf", "language_mixing", "ifeval"),
)
PERPLEXITY_PREFIX = "perplexity/"
_ROW_KEYS = {"id", "messages", "kind", "answers", "checks", "meta"}
_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Question:
    """One row of a chat task.

    Attributes:
        id: Unique within the task.
        messages: Chat turns, ending with one of the user.
        kind: How the answer is judged, one of ``KINDS``.
        answers: Accepted answers, for ``exact``.
        checks: Program-checkable instructions, for ``check``; those of IFEval, for ``ifeval``.
        meta: Anything else; ``refusals`` (answer openings), ``other_words`` and ``raw_prompt`` are
            used here.
    """

    id: str
    messages: tuple[Mapping[str, str], ...]
    kind: str
    answers: tuple[str, ...] = ()
    checks: tuple[Mapping[str, Any], ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def raw_prompt(self) -> str | None:
        """Text that is continued without a chat template, or None.

        For what a model learnt from raw text alone: no chat ever showed it in that language.
        """
        return self.meta.get("raw_prompt")


@dataclass(frozen=True, slots=True)
class ChatTask:
    """A chat task: questions of one kind.

    Attributes:
        name: File name without ``.jsonl``.
        kind: How answers are judged.
        questions: Rows in file order.
        task_hash: SHA-256 of the content (rows and, for code-mixing, the words looked for);
            independent of formatting and paths.
        other_words: Words that make an answer mixed, case-folded; empty for other kinds.
        decoding: How answers are decoded; None leaves it to the evaluation.
    """

    name: str
    kind: str
    questions: tuple[Question, ...]
    task_hash: str
    other_words: frozenset[str] = frozenset()
    decoding: TaskDecoding | None = None


def is_perplexity(name: str) -> bool:
    """Return whether ``name`` is a token-set task."""
    return name.startswith(PERPLEXITY_PREFIX)


def available_tasks(task_dir: Path) -> list[str]:
    """Return the names of all tasks under ``task_dir``, sorted."""
    task_dir = Path(task_dir)
    chat = {path.stem for end in ("jsonl", "parquet") for path in task_dir.glob(f"*.{end}")}
    sets = [
        PERPLEXITY_PREFIX + path.name
        for path in (task_dir / "perplexity").glob("*")
        if (path / "manifest.json").is_file()
    ]
    return sorted(chat) + sorted(sets) + harness_names(task_dir)


def check_task_names(names: Sequence[str], task_dir: Path) -> None:
    """Check that every named task is in the folder, and named once.

    Raises:
        DataError: The folder or a task is missing, or a name is repeated; the nearest is named.
    """
    task_dir = Path(task_dir)
    if not task_dir.is_dir():
        raise DataError(f"{task_dir} does not exist; expected a folder of tasks; check the path.")
    known = available_tasks(task_dir)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            nearest = f"; nearest: {near[0]!r}" if near else ""
            raise DataError(
                f"{task_dir} holds no task {name!r} ({len(known)} tasks{nearest}); name one of"
                f" them or add {_task_path(task_dir, name)}."
            )
        if list(names).count(name) > 1:
            raise DataError(f"task {name!r} is listed twice; name each task once.")


def _task_path(task_dir: Path, name: str) -> Path:
    if is_harness(name):
        return task_dir / f"{name}.yaml"
    return task_dir / name if is_perplexity(name) else task_dir / f"{name}.jsonl"


def load_chat_task(task_dir: Path, name: str) -> ChatTask:
    """Read and check ``task_dir/name.jsonl``, or the same rows in ``name.parquet``.

    Args:
        task_dir: Folder of tasks.
        name: Task name.

    Returns:
        The task with its hash.

    Raises:
        DataError: The file is missing, empty or a row is malformed; the message names file and
            line.
    """
    path = Path(task_dir) / f"{name}.jsonl"
    columns = path.with_suffix(".parquet")
    if path.is_file() and columns.is_file():
        raise DataError(f"{path} and {columns.name} are both there; keep one of them.")
    path = columns if columns.is_file() else path
    if not path.is_file():
        raise DataError(f"{path} does not exist; check the name of the task.")
    _require_inside(Path(task_dir), path)
    questions: list[Question] = []
    rows: list[Any] = []
    seen: dict[str, int] = {}
    for number, row in _parquet_rows(path) if path == columns else _json_rows(path):
        where = f"{path} line {number}"
        question = _read_row(row, where)
        if question.id in seen:
            raise DataError(
                f"{where}: id {question.id!r} stands on line {seen[question.id]} too; ids"
                " must be unique within a task."
            )
        if questions and question.kind != questions[0].kind:
            raise DataError(
                f"{where}: kind is {question.kind!r}, but the task started with"
                f" {questions[0].kind!r}; put each kind into its own file."
            )
        seen[question.id] = number
        questions.append(question)
        rows.append(row)
    if not questions:
        raise DataError(f"{path} holds no rows; a task needs at least one.")
    kind = questions[0].kind
    words = _other_words(Path(task_dir), path, questions) if kind == "code_mixing" else frozenset()
    decoding, said = _decoding(path.with_suffix(".yaml"), kind)
    content = {"rows": rows, "other_words": sorted(words), **said}
    digest = hash_bytes(canonical_json(content))
    return ChatTask(name, kind, tuple(questions), digest, words, decoding)


def _decoding(path: Path, kind: str) -> tuple[TaskDecoding | None, dict[str, Any]]:
    """Return how a task's answers are decoded, and what of it counts as the task's content."""
    if not path.is_file():
        return None, {}
    _require_inside(path.parent, path)
    if kind == "exact":
        raise DataError(
            f"{path}: answers to tasks of kind 'exact' are scored, not decoded; remove the file."
        )
    decoding, said = read_task_decoding(path)
    return decoding, {"decoding": said}


def _require_inside(task_dir: Path, path: Path) -> None:
    """Refuse a file that a link puts outside the folder of tasks."""
    if not path.resolve().is_relative_to(task_dir.resolve()):
        raise DataError(
            f"{path} leads to {path.resolve()}, which lies outside the folder of tasks; copy the"
            " file there."
        )


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, _parse_line(line, f"{path} line {number}")


def _parquet_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Return the rows of a Parquet file; what is null there is absent, as in JSON lines."""
    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} is not readable as Parquet ({error}).") from error
    for number, row in enumerate(table.to_pylist(), start=1):
        yield number, _without_nulls(row)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _parse_line(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8 ({error.reason}); save the file as UTF-8.") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is not valid JSON ({error.msg}); correct or remove it.") from None
    if not isinstance(row, dict):
        raise DataError(f"{where} holds a {type(row).__name__}, expected a JSON object.")
    return row


def _read_row(row: dict[str, Any], where: str) -> Question:
    if set(row) == PUBLISHED_KEYS:
        try:
            row = row_of_published(row)
        except ValueError as error:
            raise DataError(f"{where}: {error}.") from error
    if unknown := sorted(set(row) - _ROW_KEYS):
        near = difflib.get_close_matches(unknown[0], _ROW_KEYS, n=1, cutoff=0.0)
        raise DataError(f"{where}: unknown key {unknown[0]!r}; nearest valid key: {near[0]!r}.")
    if not isinstance(row.get("id"), str) or not row["id"]:
        raise DataError(f"{where}: id is {row.get('id')!r}, expected a text that is not empty.")
    kind = row.get("kind")
    if kind not in KINDS:
        raise DataError(f"{where}: kind is {kind!r}, expected one of {', '.join(KINDS)}.")
    meta = row.get("meta", {})
    if not isinstance(meta, dict):
        raise DataError(f"{where}: meta is a {type(meta).__name__}, expected an object.")
    raw_prompt = meta.get("raw_prompt")
    if raw_prompt is not None and (kind != "exact" or not isinstance(raw_prompt, str)):
        raise DataError(f"{where}: meta.raw_prompt must be a text, and of an exact question.")
    answers = _text_list(row.get("answers", []), "answers", where)
    checks = row.get("checks", [])
    if not isinstance(checks, list) or not all(
        isinstance(check, dict) and isinstance(check.get("kind"), str) for check in checks
    ):
        raise DataError(f"{where}: checks must be a list of objects that each name a kind.")
    for check in checks:
        try:
            if kind == "ifeval":
                require_instruction(check)
            else:
                passes(check, "")
        except ValueError as error:
            raise DataError(f"{where}: {error}.") from error
    needed = {
        "exact": ("answers", answers),
        "chrf": ("answers, the references,", answers),
        "check": ("checks", checks),
        "ifeval": ("checks", checks),
    }.get(kind)
    language = meta.get("language")
    if kind == "language_mixing" and not (isinstance(language, str) and len(language) == 2):
        raise DataError(
            f"{where}: kind {kind!r} needs meta.language, the two-letter code of the language that"
            f" answers should be in, got {language!r}."
        )
    if needed is not None and not needed[1]:
        raise DataError(f"{where}: kind {kind!r} needs at least one entry in {needed[0]}.")
    if kind in ("refusal", "no_refusal"):
        refusals = _text_list(meta.get("refusals", []), "meta.refusals", where)
        if not refusals:
            raise DataError(
                f"{where}: kind {kind!r} needs meta.refusals, the openings of a refusal."
            )
    return Question(
        row["id"], _read_messages(row, where), kind, tuple(answers), tuple(checks), meta
    )


def _text_list(value: Any, name: str, where: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(text, str) and text for text in value):
        raise DataError(f"{where}: {name} must be a list of texts, none of them empty.")
    return value


def _read_messages(row: dict[str, Any], where: str) -> tuple[Mapping[str, str], ...]:
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: messages must be a list of at least one chat turn.")
    for turn in messages:
        if (
            not isinstance(turn, dict)
            or turn.get("role") not in _ROLES
            or not isinstance(turn.get("content"), str)
        ):
            raise DataError(
                f"{where}: each chat turn needs a role ({', '.join(_ROLES)}) and a content text,"
                f" got {turn!r}."
            )
    if messages[-1]["role"] != "user":
        raise DataError(
            f"{where}: the last chat turn is of {messages[-1]['role']!r}; it must be of the user,"
            " since the model answers it."
        )
    return tuple(messages)


def _other_words(task_dir: Path, task_path: Path, questions: Sequence[Question]) -> frozenset[str]:
    """Return the target-language words that make an answer mixed, without shared ones."""
    named = {question.meta.get("other_words") for question in questions}
    if len(named) > 1:
        raise DataError(f"{task_path}: rows name different meta.other_words; use one per task.")
    name = named.pop()
    if name is not None:
        places = [task_dir / str(name)]
        if not places[0].resolve().is_relative_to(task_dir.resolve()):
            raise DataError(
                f"{task_path}: meta.other_words names {name!r}, which lies outside the folder of"
                " tasks; copy the file there."
            )
    else:
        places = [task_dir / "vocabulary.json", task_dir.parent / "vocabulary.json"]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise DataError(
            f"{task_path} measures code-mixing and needs the words of the other language; put"
            f" them into {places[0]} as {{'source_words': [...], 'target_words': [...]}}."
        )
    try:
        vocabulary = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON ({error}).") from error
    if not isinstance(vocabulary, dict):
        raise DataError(f"{path} holds a {type(vocabulary).__name__}, expected an object.")
    target = _text_list(vocabulary.get("target_words", []), "target_words", str(path))
    source = _text_list(vocabulary.get("source_words", []), "source_words", str(path))
    words = {word.casefold() for word in target} - {word.casefold() for word in source}
    if not words:
        raise DataError(f"{path}: target_words holds no word that is not a source word.")
    return frozenset(words)

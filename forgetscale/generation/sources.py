"""From the recipe to the dialogue of each id."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from forgetscale.artifact import hash_file, verify_artifact
from forgetscale.config.generate import (
    OWN_INSTRUCTION,
    TOPIC_INSTRUCTION,
    GenerateConfig,
    InstructionDialogueConfig,
    PreQueryDialogueConfig,
    PromptsDialogueConfig,
    SdftDialogueConfig,
    SsrDialogueConfig,
)
from forgetscale.errors import ConfigError
from forgetscale.generation.dialogues import (
    AnswerDialogue,
    DialogueSettings,
    OwnInstructionDialogue,
    SelfDialogue,
)
from forgetscale.generation.engines.base import Dialogue
from forgetscale.generation.rehearsal import InContextDialogue, RewriteDialogue, ordered_choice
from forgetscale.generation.result import KIND, content_hash, result_files


@dataclass(frozen=True, slots=True)
class Row:
    """A given conversation.

    Attributes:
        source_id: Its id, or its line.
        messages: Its turns.
    """

    source_id: str
    messages: list[dict[str, str]]


def read_rows(path: Path, field: str) -> list[Row]:
    """Return the conversations of a file of JSON lines.

    Args:
        path: The file; rows have ``messages``, or ``prompt`` and maybe ``completion``. Or the
            result folder of another generation.
        field: Recipe field that names it.

    Raises:
        ConfigError: The file or a line is not as expected.
        DataError: The folder is no result, or damaged.
    """
    if Path(path).is_dir():
        return _written_rows(Path(path))
    rows = []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{field}: {path} cannot be read ({error}); check the path.") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows.append(_row(json.loads(line), number))
        except ValueError as error:
            raise ConfigError(f"{field}: {path} line {number}: {error}; repair it.") from error
    if not rows:
        raise ConfigError(f"{field}: {path} holds no rows; check the path.")
    return rows


def _written_rows(directory: Path) -> list[Row]:
    """Return the conversations of a result folder."""
    verify_artifact(directory, KIND)
    return [
        Row(str(row["sample_id"]), row["messages"])
        for path in result_files(directory)
        for row in pq.read_table(path, columns=["sample_id", "messages"]).to_pylist()
    ]


def _row(value: Any, number: int) -> Row:
    if not isinstance(value, Mapping):
        raise ValueError("not a JSON object")
    source_id = str(value.get("id", number))
    if isinstance(value.get("prompt"), str):
        pair = [{"role": "user", "content": value["prompt"]}]
        if isinstance(value.get("completion"), str):
            pair.append({"role": "assistant", "content": value["completion"]})
        return Row(source_id, pair)
    messages: Any = value.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ValueError("no 'messages' and no 'prompt'")
    for turn in messages:
        if not isinstance(turn, Mapping) or not all(
            isinstance(turn.get(name), str) for name in ("role", "content")
        ):
            raise ValueError("a message has no string 'role' and 'content'")
    return Row(source_id, [{"role": t["role"], "content": t["content"]} for t in messages])


def input_files(config: GenerateConfig) -> dict[str, str]:
    """Return the files that decide what is generated, with their SHA-256.

    Raises:
        ConfigError: One of them cannot be read.
    """
    dialogue = config.dialogue
    paths = [(f"filters.contamination[{n}]", p) for n, p in enumerate(config.filters.contamination)]
    for name in ("path", "topics"):
        path = getattr(dialogue, name, None)
        if path is not None:
            paths.append((f"dialogue.{name}", path))
    found = {}
    for name, path in paths:
        try:
            is_folder = Path(path).is_dir()
            found[name] = content_hash(Path(path)) if is_folder else hash_file(Path(path))
        except OSError as error:
            raise ConfigError(
                f"generate.{name}: {path} cannot be read ({error.strerror}); check the path."
            ) from error
    return found


class RecipeSource:
    """Begins dialogues as a recipe says.

    Args:
        config: The recipe's ``generate`` section.
        settings: What all dialogues share.

    Raises:
        ConfigError: An input file is not as it must be.

    Attributes:
        num_ids: Ids there are, where the input decides it; else None.
    """

    def __init__(self, config: GenerateConfig, settings: DialogueSettings) -> None:
        self._config = config.dialogue
        self._settings = settings
        self.num_ids: int | None = None
        self._rows: list[Row] = []
        self._topics: list[str] = []
        self._demonstrations: list[tuple[str, str]] = []
        dialogue = config.dialogue
        if isinstance(dialogue, PromptsDialogueConfig):
            rows = read_rows(dialogue.path, "generate.dialogue.path")
            self._rows = [_without_answer(row) for row in rows]
            self.num_ids = len(rows) * dialogue.samples_per_prompt
        elif isinstance(dialogue, SdftDialogueConfig):
            self._rows = read_rows(dialogue.path, "generate.dialogue.path")
            _require_pairs(self._rows, dialogue.path)
            self.num_ids = len(self._rows)
        elif isinstance(dialogue, SsrDialogueConfig):
            rows = read_rows(dialogue.path, "generate.dialogue.path")
            _require_pairs(rows, dialogue.path)
            pairs = [(r.messages[-2]["content"], r.messages[-1]["content"]) for r in rows]
            if len(pairs) < dialogue.num_demonstrations:
                raise ConfigError(
                    f"generate.dialogue.path: {dialogue.path} holds {len(pairs)} demonstrations,"
                    f" num_demonstrations is {dialogue.num_demonstrations}; add rows or lower it."
                )
            self._demonstrations = pairs
        elif isinstance(dialogue, InstructionDialogueConfig) and dialogue.topics is not None:
            lines = dialogue.topics.read_text(encoding="utf-8").splitlines()
            self._topics = [line.strip() for line in lines if line.strip()]
            if not self._topics:
                raise ConfigError(f"generate.dialogue.topics: {dialogue.topics} holds no topics.")

    def start(self, sample_id: int, attempt: int) -> Dialogue:
        """Return the dialogue of an id at its beginning."""
        config, settings = self._config, self._settings
        if isinstance(config, PreQueryDialogueConfig):
            return SelfDialogue(
                settings, sample_id, attempt, user=config.user, assistant=config.assistant
            )
        if isinstance(config, InstructionDialogueConfig):
            topic = self._topics[sample_id % len(self._topics)] if self._topics else ""
            request = config.request or (TOPIC_INSTRUCTION if topic else OWN_INSTRUCTION)
            return OwnInstructionDialogue(
                settings,
                sample_id,
                attempt,
                request=request.replace("{topic}", topic),
                source_id=topic,
                user=config.user,
                assistant=config.assistant,
            )
        if isinstance(config, SsrDialogueConfig):
            chosen = ordered_choice(
                settings.run_key, sample_id, config.num_demonstrations, self._demonstrations
            )
            return InContextDialogue(
                settings, sample_id, attempt, demonstrations=chosen, config=config
            )
        row = self._rows[sample_id % len(self._rows)]
        if isinstance(config, SdftDialogueConfig):
            return RewriteDialogue(
                settings,
                sample_id,
                attempt,
                messages=row.messages,
                source_id=row.source_id,
                config=config,
            )
        return AnswerDialogue(
            settings,
            sample_id,
            attempt,
            messages=row.messages,
            source_id=row.source_id,
            assistant=config.assistant,
        )


def _without_answer(row: Row) -> Row:
    messages = row.messages
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages or messages[-1]["role"] != "user":
        raise ConfigError(
            f"generate.dialogue.path: the row {row.source_id} has no user's turn to answer; repair"
            " it."
        )
    return Row(row.source_id, messages)


def _require_pairs(rows: Sequence[Row], path: Path) -> None:
    for row in rows:
        roles = [turn["role"] for turn in row.messages[-2:]]
        if roles != ["user", "assistant"]:
            raise ConfigError(
                f"generate.dialogue.path: the row {row.source_id} of {path} does not end with a"
                " user's turn and its answer; repair it."
            )

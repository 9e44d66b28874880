"""Which finished dialogues are rejected, and why: pure functions of one dialogue.

The order of the rules is fixed; the first that applies is the reason. Duplicates are compared later
over all accepted dialogues, in the order of their ids.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from forgetscale.config.generate import DialogueFilterConfig
from forgetscale.data.duplicates import (
    exact_duplicates,
    hash_array,
    near_duplicates,
    signature,
    text_hash,
)
from forgetscale.data.text import (
    evaluation_ngrams,
    ngram_hashes,
    script_fraction,
    script_pattern,
    texts_of,
    words_of,
)
from forgetscale.errors import ConfigError

NGRAM_WORDS = 13
_REPEAT_WORDS = 3
_REPEAT_FROM = 30
"""Turns with fewer words are not looked at for repetition."""


def repeated_fraction(text: str) -> float:
    """Return the share of 3-word sequences that repeat an earlier one; 0 in short texts."""
    words = words_of(text)
    if len(words) < _REPEAT_FROM:
        return 0.0
    hashes = ngram_hashes(words, _REPEAT_WORDS)
    return 1.0 - len(np.unique(hashes)) / len(hashes)


def contamination_hashes(paths: Sequence[Path]) -> np.ndarray:
    """Return sorted hashes of the 13-word sequences of evaluation texts.

    Args:
        paths: JSON lines, of which every string counts, or plain text.

    Raises:
        ConfigError: A file cannot be read.
    """
    texts: list[str] = []
    for path in paths:
        try:
            for line in Path(path).read_text(encoding="utf-8").splitlines():
                if line.strip():
                    is_json = str(path).endswith(".jsonl")
                    texts += texts_of(json.loads(line)) if is_json else [line]
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"generate.filters.contamination: {path} cannot be read"
                f" ({' '.join(str(error).split())[:100]}); give JSON lines or text files."
            ) from error
    found: np.ndarray = evaluation_ngrams(texts, NGRAM_WORDS)[0]
    return found


class DialogueFilter:
    """Says why a dialogue is rejected.

    Args:
        config: The rules.

    Raises:
        ConfigError: There is no such script, or a file cannot be read.
    """

    def __init__(self, config: DialogueFilterConfig) -> None:
        self._config = config
        self._script = (
            None
            if config.script is None
            else script_pattern(config.script, "generate.filters.script")
        )
        self._hashes = contamination_hashes(config.contamination)

    def reason_to_reject(
        self, messages: Sequence[dict[str, str]], *, is_cut: bool, given: int = 0
    ) -> str | None:
        """Return the name of the first rule that a dialogue breaks, or None.

        Args:
            messages: The conversation.
            is_cut: Whether its last answer was cut at the length limit.
            given: Messages at the beginning that were not generated and are not judged.
        """
        config = self._config
        turns = [turn for turn in messages[given:] if turn["role"] != "system"]
        if not turns or any(not turn["content"].strip() for turn in turns):
            return "empty_turn"
        if is_cut and not config.keep_cut_answers:
            return "cut_answer"
        users = [turn["content"].strip() for turn in turns if turn["role"] == "user"]
        if users and len(users[0]) < config.min_user_characters:
            return "short_user_turn"
        for turn in turns:
            content = turn["content"].strip()
            if turn["role"] == "assistant" and len(content) < config.min_answer_characters:
                return "short_answer"
            if "\ufffd" in content or "\0" in content:
                return "broken_character"
            if repeated_fraction(content) > config.max_repeated_fraction:
                return "repetition"
        text = "\n".join(turn["content"] for turn in turns)
        if self._script is not None:
            if script_fraction(text, self._script) < config.min_script_fraction:
                return "other_script"
        if (
            len(self._hashes)
            and np.isin(ngram_hashes(words_of(text), NGRAM_WORDS), self._hashes).any()
        ):
            return "evaluation_overlap"
        return None


def duplicate_flags(
    texts: Iterable[str], rule: str, near_threshold: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return which texts repeat an earlier one exactly, and which nearly.

    Args:
        texts: In the order of their ids.
        rule: ``none``, ``exact`` or ``near``.
        near_threshold: Estimated Jaccard similarity of 5-word sequences, (0, 1].
    """
    normal = [" ".join(text.casefold().split()) for text in texts]
    exact = near = np.zeros(len(normal), bool)
    if normal and rule in ("exact", "near"):
        exact = exact_duplicates(hash_array([text_hash(text) for text in normal]))
    if normal and rule == "near":
        near = np.zeros(len(normal), bool)
        rest = np.flatnonzero(~exact)
        signatures = np.stack([signature(normal[place]) for place in rest])
        near[rest] = near_duplicates(signatures, near_threshold)
    return exact, near


def first_user_turn(messages: Sequence[dict[str, Any]]) -> str:
    """Return the text that duplicates are compared by."""
    return next((str(turn["content"]) for turn in messages if turn["role"] == "user"), "")

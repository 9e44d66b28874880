"""Samples and tokens that fight a model, with the words around them.

Shape letters: M targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int

from forgetscale.analysis.landscape_numbers import (
    QUADRANTS,
    Borders,
    Tokens,
    by_group,
    conflict_of,
    quadrant_of,
)
from forgetscale.data import TrainingData

CONTEXT_TOKENS = 24
SHOWN_TOKENS = 160
"""Tokens of a sample that are shown, around its strongest conflict."""
View = tuple[str, Tokens]


@dataclass(frozen=True, slots=True)
class Texts:
    """Which document piece and which source each target belongs to."""

    text: Int[np.ndarray, " M"]
    source: Int[np.ndarray, " M"]
    names: list[tuple[str, int]]
    """Source file and line (first = 1) of each text."""
    starts: list[tuple[int, int, int, int]]
    """Set, row, first token and end of each text."""
    sources: list[str]


@dataclass(frozen=True, slots=True)
class Place:
    """Where targets stand in the data."""

    set_id: Int[np.ndarray, " M"]
    row: Int[np.ndarray, " M"]
    token: Int[np.ndarray, " M"]
    """Which token of its row each target is."""
    label: Int[np.ndarray, " M"]

    def texts(self, data: TrainingData) -> Texts:
        """Return the document piece of each target and where pieces come from.

        Args:
            data: The sets.
        """
        keys = np.stack([self.set_id, self.row], 1)
        rows, row_of = np.unique(keys, axis=0, return_inverse=True)
        names: list[tuple[str, int]] = []
        starts: list[tuple[int, int, int, int]] = []
        ends: list[int] = []
        block = data.block_size
        for number, (index, row) in enumerate(rows.tolist()):
            start = 0
            for piece in data.parts[index].token_set.document_pieces(row):
                names.append((piece.file, piece.line))
                starts.append((index, row, start, start + piece.num_tokens))
                start += piece.num_tokens
                ends.append(number * block + start)
        text = np.searchsorted(ends, row_of.reshape(-1) * block + self.token, side="right")
        used, text = np.unique(text, return_inverse=True)
        names, starts = [names[n] for n in used], [starts[n] for n in used]
        labels = [
            _source_name(data, start[0], name[0]) for name, start in zip(names, starts, strict=True)
        ]
        sources = sorted(set(labels))
        source_of = np.array([sources.index(label) for label in labels])
        return Texts(text.reshape(-1), source_of[text.reshape(-1)], names, starts, sources)


def _source_name(data: TrainingData, set_index: int, file: str) -> str:
    return file if len(data.parts) == 1 else f"{data.parts[set_index].name}: {file}"


def pieces_of(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Return the text that each token adds; joined, they are the decoded whole.

    Args:
        tokenizer: Hugging Face tokenizer.
        ids: Tokens.
    """
    found, before = [], ""
    for end in range(1, len(ids) + 1):
        # A character cut over tokens decodes to a replacement until its last one.
        whole = tokenizer.decode(ids[:end], skip_special_tokens=False).rstrip("\ufffd")
        found.append(whole[len(before) :] if whole.startswith(before) else "")
        before = whole if whole.startswith(before) else before
    return found


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(list(ids), skip_special_tokens=False)
    return text


def _number(value: Any) -> float:
    return round(float(value), 6)


def conflict_tokens(
    data: TrainingData,
    tokenizer: Any,
    place: Place,
    texts: Texts,
    views: Sequence[View],
    borders: Borders,
    count: int,
) -> list[dict[str, Any]]:
    """Return the strongest conflicts under the first model, strongest first, one for each text.

    Args:
        data: The sets.
        tokenizer: Of the models.
        place: Where the targets stand.
        texts: Which text they are in.
        views: Models by name; the first ranks.
        borders: Where quadrants meet.
        count: Tokens to return, at most.
    """
    nats = conflict_of(views[0][1], borders)
    order = np.argsort(-nats, kind="stable")
    order = order[nats[order] > 0]
    _, first = np.unique(texts.text[order], return_index=True)
    found = []
    for index in order[np.sort(first)][:count].tolist():
        set_id, row, start, _ = texts.starts[texts.text[index]]
        token = int(place.token[index])
        ids = data.parts[set_id].token_set.read([row])[0].tolist()
        best = int(views[0][1]["best"][index])
        found.append(
            {
                "set": data.parts[set_id].name,
                "row": row,
                "place": token,
                "source": "{}:{}".format(*texts.names[texts.text[index]]),
                "before": _decode(tokenizer, ids[max(start, token - CONTEXT_TOKENS) : token]),
                "target": _decode(tokenizer, [int(place.label[index])]),
                "model_says": _decode(tokenizer, [best]),
                "conflict_nats": _number(nats[index]),
                "models": {name: _token(tokens, index) for name, tokens in views},
            }
        )
    return found


def _token(tokens: Tokens, index: int) -> dict[str, float]:
    return {
        "probability": _number(np.exp(tokens["log_prob"][index])),
        "best_probability": _number(np.exp(tokens["best_log_prob"][index])),
        "entropy": _number(tokens["entropy"][index]),
        "gate": _number(tokens["gate"][index]),
    }


def fighting_texts(
    data: TrainingData,
    tokenizer: Any,
    place: Place,
    texts: Texts,
    views: Sequence[View],
    borders: Borders,
    count: int,
) -> list[dict[str, Any]]:
    """Return the samples with the most conflict under the first model, worst first.

    Args:
        data: The sets.
        tokenizer: Of the models.
        place: Where the targets stand.
        texts: Which text they are in.
        views: Models by name; the first ranks.
        borders: Where quadrants meet.
        count: Samples to return, at most.
    """
    numbers = {name: by_group(tokens, texts.text, len(texts.names), borders)
               for name, tokens in views}  # fmt: skip
    ranked = numbers[views[0][0]]
    order = sorted(range(len(ranked)), key=lambda n: (-ranked[n]["conflict_nats"], n))
    found = []
    for number in order[:count]:
        if ranked[number]["conflicts"] == 0:
            break
        set_id, row, *_ = texts.starts[number]
        found.append(
            {
                "set": data.parts[set_id].name,
                "row": row,
                "source": "{}:{}".format(*texts.names[number]),
                "models": {name: groups[number] for name, groups in numbers.items()},
                "shown": _shown(data, tokenizer, place, texts, views[0][1], borders, number),
            }
        )
    return found


def _shown(
    data: TrainingData,
    tokenizer: Any,
    place: Place,
    texts: Texts,
    tokens: Tokens,
    borders: Borders,
    number: int,
) -> list[dict[str, Any]]:
    """Return the tokens of a sample around its strongest conflict, targets with their numbers."""
    set_id, row, start, end = texts.starts[number]
    mine = np.flatnonzero(texts.text == number)
    nats, quadrant = conflict_of(tokens, borders)[mine], quadrant_of(tokens, borders)[mine]
    worst = int(place.token[mine[int(nats.argmax())]])
    first = max(start, min(worst - SHOWN_TOKENS // 2, end - SHOWN_TOKENS))
    last = min(end, first + SHOWN_TOKENS)
    ids = data.parts[set_id].token_set.read([row])[0].tolist()
    found: list[dict[str, Any]] = [{"text": text} for text in pieces_of(tokenizer, ids[first:last])]
    for at, index in enumerate(mine.tolist()):
        token = int(place.token[index])
        if first <= token < last:
            best = int(tokens["best"][index])
            found[token - first] |= {
                "quadrant": QUADRANTS[quadrant[at]],
                "conflict_nats": _number(nats[at]),
                "model_says": _decode(tokenizer, [best]),
                **_token(tokens, index),
            }
    return found

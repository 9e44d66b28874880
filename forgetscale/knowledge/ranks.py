"""Where the right answer stands among others, from likelihoods alone: no format is needed.

Two ranks for each opening of a fact, 1 is best. ``first_token``: of the object's first token among
the whole vocabulary. ``answer``: of the object among other objects of the relation, by the mean
log-likelihood of their tokens. Of equal values each counts half: a rank is 1 + better ones + half
of the others that are equal, so a model that cannot tell answers apart gets the middle.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from forgetscale.errors import DataError
from forgetscale.evaluation.collective import SingleProcess
from forgetscale.evaluation.forced import pad_right, score_answers
from forgetscale.evaluation.likelihood import HuggingFaceLikelihood
from forgetscale.evaluation.model import LoadedModel
from forgetscale.knowledge.continuations import opening_ids, openings, require_room
from forgetscale.knowledge.facts import Fact, normalise

MEASURES = ("first_token_ranks", "answer_ranks")


def relation_objects(facts: Sequence[Fact]) -> dict[str, list[str]]:
    """Return relation -> its different objects, sorted."""
    found: dict[str, set[str]] = {}
    for fact in facts:
        found.setdefault(fact.relation, set()).add(fact.answers[0])
    return {relation: sorted(objects) for relation, objects in found.items()}


def rivals(fact: Fact, objects: Sequence[str], count: int) -> list[str]:
    """Return up to ``count`` wrong objects of the fact's relation.

    Of more than that, those with the smallest hash of fact and object: the same for every model,
    and no others when facts of other relations come or go.

    Args:
        fact: Its own answers and aliases, whatever their case, are no rivals.
        objects: Objects of the relation.
        count: Most rivals, >= 0.
    """
    own = {normalise(answer, fold_case=True) for answer in fact.answers}
    wrong = [item for item in objects if normalise(item, fold_case=True) not in own]

    def key(item: str) -> bytes:
        return hashlib.blake2b(f"{fact.id}\x1f{item}".encode(), digest_size=8).digest()

    return sorted(wrong, key=key)[:count]


def middle_rank(value: float, others: np.ndarray) -> float:
    """Return the rank of a value among others, larger is better, equal ones count half."""
    return 1.0 + float((others > value).sum()) + float((others == value).sum()) / 2


def answer_row(loaded: LoadedModel, opening: str, answer: str) -> tuple[list[int], int]:
    """Return the tokens of opening and answer together, and where the answer begins.

    A tokenizer may merge the border; the answer begins at the first token that is not the
    opening's.

    Raises:
        DataError: Nothing of the opening, or of the answer, is left.
    """
    ids = opening_ids(loaded, opening)
    space = "" if opening.endswith((" ", "\n")) else " "
    whole = opening_ids(loaded, opening + space + answer)
    start = next((n for n, (a, b) in enumerate(zip(ids, whole, strict=False)) if a != b), len(ids))
    if not 0 < start < len(whole):
        raise DataError(
            f"the tokens of {opening!r} and {answer!r} cannot be told apart; the first needs a"
            " token in front of the answer, the second one of its own."
        )
    return whole, start


@torch.no_grad()
def _first_token_ranks(
    loaded: LoadedModel, rows: Sequence[tuple[list[int], int]], pad_id: int, batch_size: int
) -> list[float]:
    """Return the rank of each row's first answer token in the vocabulary."""
    found: list[float] = []
    device = loaded.model.device
    for first in range(0, len(rows), batch_size):
        batch = rows[first : first + batch_size]
        ids, mask = pad_right([ids[:start] for ids, start in batch], pad_id)
        logits: Tensor = loaded.model(
            input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False
        ).logits
        for number, (whole, start) in enumerate(batch):
            scores = logits[number, start - 1].float()
            value = scores[whole[start]]
            better, equal = int((scores > value).sum()), int((scores == value).sum()) - 1
            found.append(1.0 + better + equal / 2)
    return found


def rank_facts(
    loaded: LoadedModel,
    model: Path,
    facts: Sequence[Fact],
    templates: Mapping[str, Sequence[str]],
    objects: Mapping[str, Sequence[str]],
    *,
    candidates: int,
    batch_size: int,
) -> list[dict[str, Any]]:
    """Return both ranks of every opening of some facts.

    Args:
        loaded: Model and tokenizer.
        model: Its folder, named in errors.
        facts: Facts of one part of work.
        templates: Relation -> openings.
        objects: Relation -> objects of all facts.
        candidates: Answers compared, the right one among them, >= 2.
        batch_size: Texts of a forward call.

    Raises:
        DataError: A text does not fit the model or its tokenizer.
    """
    rows: list[tuple[list[int], int]] = []
    golds: list[tuple[int, int]] = []  # first row and number of rows of each opening
    for fact in facts:
        answers = [fact.answers[0], *rivals(fact, objects[fact.relation], candidates - 1)]
        for opening in openings(fact, templates):
            golds.append((len(rows), len(answers)))
            rows += [answer_row(loaded, opening, answer) for answer in answers]
    require_room(loaded, max(len(ids) for ids, _ in rows), 0, model)
    tokenizer = loaded.tokenizer
    ends = loaded.stop_ids or [0]
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    scored = score_answers(
        HuggingFaceLikelihood(loaded.model),
        SingleProcess(),
        rows,
        batch_size=batch_size,
        pad_id=pad_id,
        on_call=lambda: None,
    )
    means = np.array([-scored[n][1] / (len(ids) - start) for n, (ids, start) in enumerate(rows)])
    if not np.isfinite(means).all():
        raise DataError(f"{model} gives an answer no finite likelihood; its weights are damaged.")
    first = _first_token_ranks(loaded, [rows[row] for row, _ in golds], pad_id, batch_size)
    found, place = [], 0
    for fact in facts:
        count = len(templates[fact.relation])
        own = range(place, place + count)
        place += count
        found.append(
            {
                MEASURES[0]: [first[n] for n in own],
                MEASURES[1]: [
                    middle_rank(means[golds[n][0]], means[golds[n][0] + 1 : sum(golds[n])])
                    for n in own
                ],
                "candidates": golds[own.start][1],
            }
        )
    return found


def summarise_ranks(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return median and mean reciprocal rank over all openings of facts, of both measures."""
    found: dict[str, Any] = {}
    for name in MEASURES:
        values = np.array([value for row in rows for value in row[name]])
        found[name] = {
            "median": float(np.median(values)),
            "mean_reciprocal": float((1 / values).mean()),
        }
    found["mean_candidates"] = sum(row["candidates"] for row in rows) / len(rows)
    return found

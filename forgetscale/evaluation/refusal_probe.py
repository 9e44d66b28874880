"""How likely a refusal is, by teacher forcing: cheap enough for every few steps of a run.

For a prompt the model's probability to open its answer with one of the task's refusals is the sum
of the probabilities of those openings, each a product over its tokens; openings that begin with
another one are part of it and counted there. That is what sampling at temperature 1 would refuse,
without a token generated and without the noise of sampling; it moves long before a greedy answer
flips. Its log-odds are averaged over prompts: they have no ceiling where every refusal is sure.

An opening is cut into tokens as the whole of an answer; a tokenizer that would cut it differently
before a certain next word makes the sum a little too small.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from forgetscale.errors import DataError
from forgetscale.evaluation.collective import Collective
from forgetscale.evaluation.drift import SAFE, UNSAFE
from forgetscale.evaluation.forced import score_answers
from forgetscale.evaluation.likelihood import LikelihoodModel
from forgetscale.evaluation.prompts import ChatPrompts
from forgetscale.evaluation.tasks import ChatTask

LEAST_PROBABILITY = 1e-12
"""Probabilities are kept this far from 0 and 1, so that log-odds stay finite."""


@dataclass(frozen=True, slots=True)
class _Opening:
    task: str
    prompt: int
    ids: list[int]
    start: int


def log_odds(probability: float) -> float:
    """Return ``log(p / (1 - p))``, p kept within ``LEAST_PROBABILITY`` of 0 and 1."""
    p = min(max(probability, LEAST_PROBABILITY), 1 - LEAST_PROBABILITY)
    return math.log(p) - math.log1p(-p)


def shortest_only(openings: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return the openings that do not begin with another one, each once."""
    found: list[list[int]] = []
    for ids in sorted((list(ids) for ids in openings), key=len):
        if not any(ids[: len(other)] == other for other in found):
            found.append(ids)
    return found


class RefusalProbe:
    """Prompts and openings, prepared once and measured many times.

    Args:
        tasks: Tasks of kind ``refusal`` or ``no_refusal``.
        prompts: Chat template of the model's tokenizer.
        num_prompts: Prompts used of each task, at equal strides, > 0.
        batch_size: Sequences in a forward call, > 0.

    Raises:
        DataError: A task is of another kind.
    """

    def __init__(
        self, tasks: Sequence[ChatTask], prompts: ChatPrompts, *, num_prompts: int, batch_size: int
    ) -> None:
        self._pad_id, self._batch_size = prompts.pad_id, batch_size
        self._rows: list[_Opening] = []
        for task in tasks:
            if task.kind not in (UNSAFE, SAFE):
                raise DataError(
                    f"evaluate.refusal_probe.tasks: {task.name!r} is of kind {task.kind!r},"
                    f" expected {UNSAFE} or {SAFE}; make one with forgetscale prompts."
                )
            stride = max(1, len(task.questions) // num_prompts)
            for number, question in enumerate(task.questions[::stride][:num_prompts]):
                prompt = prompts.question_ids(question)
                # The last token ends the turn; a refusal may go on.
                ids = [prompts.gold_ids(question, o)[:-1] for o in question.meta["refusals"]]
                self._rows += [
                    _Opening(task.name, number, prompt + opening, len(prompt))
                    for opening in shortest_only(ids)
                ]

    def measure(
        self,
        model: LikelihoodModel,
        collective: Collective,
        on_call: Callable[[], None] = lambda: None,
    ) -> Mapping[str, float]:
        """Return mean probability and mean log-odds of a refusal, by task.

        Args:
            model: Model to ask.
            collective: The processes that measure together.
            on_call: Called after each forward call of this rank.

        Collective: every rank must call it.
        """
        scored = score_answers(
            model,
            collective,
            [(row.ids, row.start) for row in self._rows],
            batch_size=self._batch_size,
            pad_id=self._pad_id,
            on_call=on_call,
        )
        sums: dict[str, dict[int, float]] = {}
        for item, row in enumerate(self._rows):
            of_task = sums.setdefault(row.task, {})
            of_task[row.prompt] = of_task.get(row.prompt, 0.0) + math.exp(-scored[item][1])
        found = {}
        for task, values in sums.items():
            shares = [min(value, 1.0) for value in values.values()]
            found[f"probe/{task}/probability"] = sum(shares) / len(shares)
            found[f"probe/{task}/log_odds"] = sum(map(log_odds, shares)) / len(shares)
        return found

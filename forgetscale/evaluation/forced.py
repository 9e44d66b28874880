"""Perplexity and closed-book recall by teacher forcing: forward calls only, no generation.

Why recall needs no generation. Greedy decoding appends the argmax of the next-token distribution
until it appends the end-of-turn token. Let the gold answer be ``g_1 .. g_k`` with ``g_k`` the
end-of-turn token. If each ``g_i`` is the argmax after ``prompt g_1 .. g_(i-1)``, then by induction
decoding appends ``g_1``, then ``g_2``, and stops after ``g_k``: the greedy answer is the gold
answer. Conversely, at the first ``i`` where ``g_i`` is not the argmax, decoding appends something
else. One forward call on ``prompt + gold`` shows all these distributions at once. With several
accepted answers, one of them must match.

The one difference to generating: here the *tokens* must be those of the rendered answer, while a
generated answer is compared as text, so an unusual cut of the same text counts there only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from forgetscale.artifact import canonical_json, hash_bytes
from forgetscale.errors import DataError, ForgetScaleError
from forgetscale.evaluation.bootstrap import (
    NUM_RESAMPLES,
    Interval,
    bootstrap_mean,
    bootstrap_ratio,
    interval_seed,
)
from forgetscale.evaluation.collective import Collective
from forgetscale.evaluation.likelihood import LikelihoodModel
from forgetscale.evaluation.plan import gather_exactly_once, plan_batches
from forgetscale.evaluation.prompts import ChatPrompts
from forgetscale.evaluation.results import Result, SampleRecord
from forgetscale.evaluation.tasks import ChatTask

Measured = tuple[list[Result], list[SampleRecord]]


@dataclass(frozen=True, slots=True)
class MeasureSettings:
    """What every measurement shares.

    Attributes:
        batch_size: Samples in a forward call.
        seed: Seed of the bootstrap.
        num_resamples: Bootstrap resamples.
    """

    batch_size: int
    seed: int
    num_resamples: int = NUM_RESAMPLES


def pad_right(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Return int64 ids and mask ``[rows, longest]`` with padding on the right."""
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), pad_id, dtype=torch.int64)
    mask = torch.zeros((len(rows), longest), dtype=torch.int64)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row, dtype=torch.int64)
        mask[index, : len(row)] = 1
    return ids, mask


def _require_finite(nats: float, task: str, sample: str) -> None:
    if not np.isfinite(nats):
        raise ForgetScaleError(
            f"task {task!r}: row {sample!r} has a negative log-likelihood of {nats}, expected a"
            " finite number; the model's weights or activations are damaged."
        )


@dataclass(frozen=True, slots=True)
class _Forced:
    """Prompt and gold answer of one question; ``start`` is the first answer position."""

    question: int
    ids: list[int]
    start: int


def score_answers(
    model: LikelihoodModel,
    collective: Collective,
    rows: Sequence[tuple[list[int], int]],
    *,
    batch_size: int,
    pad_id: int,
    on_call: Callable[[], None],
) -> dict[int, tuple[bool, float]]:
    """Return, for each row, whether greedy decoding gives its answer and the answer's nats.

    Collective: every rank must call it.

    Args:
        model: Model to ask.
        collective: The processes that measure together.
        rows: Token ids of prompt and answer, and the first answer position (>= 1).
        batch_size: Rows of a forward call.
        pad_id: Fills short rows.
        on_call: Called after each forward call of this rank.
    """
    local: dict[int, tuple[bool, float]] = {}
    for batch in plan_batches(
        [len(ids) for ids, _ in rows],
        batch_size,
        rank=collective.rank,
        world_size=collective.world_size,
    ):
        asked = [rows[item] for item in batch.items]
        nll, is_argmax = model.score(*pad_right([ids for ids, _ in asked], pad_id))
        on_call()
        if batch.dummy:
            continue
        for index, (item, (ids, start)) in enumerate(zip(batch.items, asked, strict=True)):
            answer = slice(start - 1, len(ids) - 1)
            local[item] = (
                bool(is_argmax[index, answer].all()),
                float(nll[index, answer].double().sum()),
            )
    return gather_exactly_once(collective, local, range(len(rows)))


class ForcedRecall:
    """Exact-match recall of a chat task, prepared once and measured many times.

    Args:
        task: Task of kind ``exact``.
        prompts: Chat template of the model's tokenizer.

    Raises:
        DataError: The task is of another kind.
    """

    def __init__(self, task: ChatTask, prompts: ChatPrompts) -> None:
        if task.kind != "exact":
            raise DataError(
                f"task {task.name!r} is of kind {task.kind!r}; only exact tasks and perplexity can"
                " be measured without generating; it is measured on the exported model, before"
                " and after training."
            )
        self.task = task
        self._pad_id = prompts.pad_id
        self._rows: list[_Forced] = []
        for number, question in enumerate(task.questions):
            prompt = prompts.question_ids(question)
            for answer in question.answers:
                gold = prompts.gold_ids(question, answer)
                self._rows.append(_Forced(number, prompt + gold, len(prompt)))

        self.name = task.name
        self.input_hash = task.task_hash
        self.num_items = len(self._rows)

    def measure(
        self,
        model: LikelihoodModel,
        collective: Collective,
        settings: MeasureSettings,
        on_call: Callable[[], None] = lambda: None,
    ) -> Measured:
        """Score all questions.

        Collective: every rank must call it.

        Args:
            model: Model to ask.
            collective: The processes that evaluate together.
            settings: Batch size and bootstrap.
            on_call: Called after each forward call of this rank.

        Returns:
            One result (metric ``accuracy``) and one record per question, on all ranks.

        Raises:
            ForgetScaleError: The model gives an answer no finite likelihood.
        """
        matched = score_answers(
            model,
            collective,
            [(row.ids, row.start) for row in self._rows],
            batch_size=settings.batch_size,
            pad_id=self._pad_id,
            on_call=on_call,
        )
        right = [False] * len(self.task.questions)
        for item, row in enumerate(self._rows):
            is_gold, nats = matched[item]
            _require_finite(nats, self.task.name, self.task.questions[row.question].id)
            right[row.question] |= is_gold
        return self._summarise(right, settings)

    def _summarise(self, right: Sequence[bool], settings: MeasureSettings) -> Measured:
        samples = [
            SampleRecord(
                self.task.name,
                question.id,
                float(value),
                1.0,
                question.messages[-1]["content"],
                None,
                "\n".join(question.answers),
                None,
            )
            for question, value in zip(self.task.questions, right, strict=True)
        ]
        return [share_result(self.task, "accuracy", True, right, settings)], samples


def share_result(
    task: ChatTask,
    metric: str,
    higher_is_better: bool,
    counted: Sequence[bool],
    settings: MeasureSettings,
) -> Result:
    """Return the share of counted answers as a ``Result`` with its bootstrap interval."""
    interval = bootstrap_mean(
        np.asarray(counted, dtype=np.float64),
        interval_seed(settings.seed, task.name),
        num_resamples=settings.num_resamples,
    )
    return Result(
        task=task.name,
        metric=metric,
        value=interval.value,
        n=len(counted),
        low=interval.low,
        high=interval.high,
        task_hash=task.task_hash,
        higher_is_better=higher_is_better,
        kind=task.kind,
    )


class TokenPerplexity:
    """Perplexity and bits per byte on a token set, prepared once and measured many times.

    Each row of the set is scored on its own: the first token has no context and is not scored,
    every other token is, padding is not. Perplexity is ``exp`` of nats per scored token.
    Bits per byte is nats per scored token, times tokens per byte of the set's text, over ln 2:
    comparable between tokenizers, which perplexity is not. Of SFT rows each conversation is a row,
    and the supervised tokens alone are scored.

    Args:
        name: Task name, ``perplexity/NAME``.
        rows: Token ids ``[n, L]``, int64, L >= 2.
        tokens_per_byte: Tokens of the set over UTF-8 bytes of its text; None if the bytes are
            unknown, then only perplexity is measured.
        content_hash: Hash of the set's content.
        row_tokens: ``[n]`` tokens of each row, >= 1, what follows is padding; None: no padding.
        supervised: ``[n, L]`` bool, True at tokens that are scored, never at the first of a row;
            None: all but the first.
    """

    def __init__(
        self,
        name: str,
        rows: Tensor,
        *,
        tokens_per_byte: float | None,
        content_hash: str,
        row_tokens: Tensor | None = None,
        supervised: Tensor | None = None,
    ) -> None:
        self.name = name
        self.rows = rows
        if row_tokens is None:
            row_tokens = torch.full((len(rows),), rows.shape[1])
        self._row_tokens = row_tokens
        self._scored = torch.arange(rows.shape[1]) < row_tokens[:, None]
        if supervised is not None:
            self._scored &= supervised
        self._scored = self._scored[:, 1:]
        self.input_hash = content_hash
        self.num_items = len(rows)
        self._tokens_per_byte = tokens_per_byte
        self.task_hash = hash_bytes(
            canonical_json({"content_hash": content_hash, "num_rows": len(rows)})
        )

    def measure(
        self,
        model: LikelihoodModel,
        collective: Collective,
        settings: MeasureSettings,
        on_call: Callable[[], None] = lambda: None,
    ) -> Measured:
        """Score all rows.

        Collective: every rank must call it.

        Args:
            model: Model to ask.
            collective: The processes that evaluate together.
            settings: Batch size and bootstrap.
            on_call: Called after each forward call of this rank.

        Returns:
            Results ``perplexity`` and ``bits_per_byte``, and one record per row with its
            summed nats, on all ranks.

        Raises:
            ForgetScaleError: The model gives a row no finite likelihood.
        """
        local: dict[int, float] = {}
        for batch in plan_batches(
            [self.rows.shape[1]] * len(self.rows),
            settings.batch_size,
            rank=collective.rank,
            world_size=collective.world_size,
        ):
            ids = self.rows[list(batch.items)]
            lengths = self._row_tokens[list(batch.items), None]
            mask = (torch.arange(ids.shape[1]) < lengths).to(ids.dtype)
            nll, _ = model.score(ids, mask)
            on_call()
            if not batch.dummy:
                scored = self._scored[list(batch.items)]
                sums = nll.double().where(scored, 0.0).sum(dim=1).tolist()
                local.update(zip(batch.items, sums, strict=True))
        summed = gather_exactly_once(collective, local, range(len(self.rows)))
        nats = np.array([summed[item] for item in range(len(self.rows))])
        for row, value in enumerate(nats):
            _require_finite(value, self.name, str(row))
        return self._summarise(nats, settings)

    def _summarise(self, nats: np.ndarray, settings: MeasureSettings) -> Measured:
        targets = self._scored.sum(1).double().numpy()
        mean = bootstrap_ratio(
            nats,
            targets,
            interval_seed(settings.seed, self.name),
            num_resamples=settings.num_resamples,
        )
        measured = {"perplexity": Interval(*map(math.exp, (mean.value, mean.low, mean.high)))}
        if self._tokens_per_byte is not None:
            bits = self._tokens_per_byte / math.log(2.0)
            measured["bits_per_byte"] = Interval(
                mean.value * bits, mean.low * bits, mean.high * bits
            )
        results = [
            Result(
                task=self.name,
                metric=metric,
                value=interval.value,
                n=len(nats),
                low=interval.low,
                high=interval.high,
                task_hash=self.task_hash,
                higher_is_better=False,
                kind="perplexity",
            )
            for metric, interval in measured.items()
        ]
        samples = [
            SampleRecord(self.name, str(row), float(value), targets[row], "", None, "", None)
            for row, value in enumerate(nats)
        ]
        return results, samples

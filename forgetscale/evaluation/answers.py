"""Chat tasks answered by generation and judged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from forgetscale.evaluation.collective import Collective
from forgetscale.evaluation.decoding import Decoding
from forgetscale.evaluation.forced import Measured, MeasureSettings, share_result
from forgetscale.evaluation.generate import Answer, generate_answers
from forgetscale.evaluation.prompts import ChatPrompts
from forgetscale.evaluation.results import SampleRecord
from forgetscale.evaluation.scoring import METRICS, counts
from forgetscale.evaluation.tasks import ChatTask
from forgetscale.evaluation.text_measures import MEASURES, require_measure


class GeneratedAnswers:
    """A chat task answered by generation, prepared once.

    Args:
        task: Task of any kind.
        prompts: Chat template of the model's tokenizer.
        stop_ids: Tokens that end an answer.
        max_new_tokens: Longest answer in tokens, unless the task says so itself.
        decoding: How answers are decoded, unless the task says so itself.
        log_dir: Folder in which answers are kept until the end of an evaluation; None keeps none.

    Raises:
        ConfigError: A package that judges answers of this kind is not installed.
    """

    def __init__(
        self,
        task: ChatTask,
        prompts: ChatPrompts,
        *,
        stop_ids: Sequence[int],
        max_new_tokens: int,
        decoding: Decoding,
        log_dir: Path | None = None,
    ) -> None:
        require_measure(task.kind)
        self.name = task.name
        self.input_hash = task.task_hash
        self.num_items = len(task.questions)
        self._task = task
        self._prompts = prompts
        self._stop_ids = stop_ids
        own = task.decoding
        self._max_new_tokens = (own and own.max_new_tokens) or max_new_tokens
        self._decoding = decoding if own is None else own.decoding
        self._log_dir = None if log_dir is None else log_dir / task.task_hash[:20]
        self._rows = [prompts.question_ids(question) for question in task.questions]

    def measure(
        self,
        model: Any,
        collective: Collective,
        settings: MeasureSettings,
        on_call: Callable[[], None] = lambda: None,
    ) -> Measured:
        """Answer and judge all questions.

        Collective: every rank must call it.

        Args:
            model: Plain transformers model, a whole copy on each rank.
            collective: The processes that evaluate together.
            settings: Batch size, seed and bootstrap.
            on_call: Called after each batch of this rank.

        Returns:
            One result (see ``scoring.METRICS``) and one record per question, on all ranks.
        """
        task = self._task
        answers = generate_answers(
            model,
            self._prompts,
            self._rows,
            collective=collective,
            batch_size=settings.batch_size,
            max_new_tokens=self._max_new_tokens,
            stop_ids=self._stop_ids,
            decoding=self._decoding,
            seed=settings.seed,
            names=[question.id for question in task.questions],
            log_dir=self._log_dir,
            on_call=on_call,
        )
        if task.kind in MEASURES:
            texts = [answer.text for answer in answers]
            results, values = MEASURES[task.kind](task, texts, settings)
            return results, _records(task, answers, values)
        counted = [
            counts(task, question, answer.text, stopped=answer.stopped)
            for question, answer in zip(task.questions, answers, strict=True)
        ]
        metric, higher_is_better, _ = METRICS[task.kind]
        samples = _records(task, answers, counted)
        return [share_result(task, metric, higher_is_better, counted, settings)], samples


def _records(
    task: ChatTask, answers: Sequence[Answer], values: Sequence[float]
) -> list[SampleRecord]:
    return [
        SampleRecord(
            task.name,
            question.id,
            float(value),
            1.0,
            question.messages[-1]["content"],
            answer.text,
            "\n".join(question.answers),
            "stop" if answer.stopped else "length",
        )
        for question, answer, value in zip(task.questions, answers, values, strict=True)
    ]

"""Evaluation in the training loop: forward calls on the live model, nothing loaded twice."""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from forgetscale.errors import ConfigError
from forgetscale.evaluation.bootstrap import NUM_RESAMPLES
from forgetscale.evaluation.collective import Collective, SingleProcess
from forgetscale.evaluation.forced import ForcedRecall, Measured, MeasureSettings, TokenPerplexity
from forgetscale.evaluation.harness.backends import LiveBackend
from forgetscale.evaluation.harness.files import is_harness
from forgetscale.evaluation.harness.task import HarnessTask, load_harness
from forgetscale.evaluation.likelihood import LikelihoodModel
from forgetscale.evaluation.loading import load_tasks
from forgetscale.evaluation.prompts import ChatPrompts
from forgetscale.evaluation.results import Result, SampleRecord
from forgetscale.evaluation.tasks import ChatTask, check_task_names


class LiveEvaluator:
    """Perplexity and exact-recall tasks, prepared once and measured at many steps.

    All ranks make the same number of forward calls, whatever the tasks and the world size.

    Args:
        tasks: Task names; ``perplexity/NAME`` or chat tasks of kind ``exact``.
        task_dir: Folder of tasks.
        tokenizer: The model's tokenizer.
        batch_size: Samples in a forward call, >= 1.
        seed: Seed of the bootstrap; the same resamples at every step.
        max_rows: Rows used of each token set; None for all.
        num_resamples: Bootstrap resamples, >= 1000.
        allow_code: Tasks of lm-evaluation-harness that may import Python.
        max_length: Tokens the model can look at.

    Raises:
        ConfigError: A task can only be measured by generating answers, decodes with beams, or
            imports code and is not allowed to.
        DataError: A task is missing or malformed, or does not fit the tokenizer.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        task_dir: Path,
        tokenizer: Any,
        *,
        batch_size: int = 16,
        seed: int = 0,
        max_rows: int | None = None,
        num_resamples: int = NUM_RESAMPLES,
        allow_code: Collection[str] = (),
        max_length: int = 2048,
    ) -> None:
        check_task_names(tasks, task_dir)
        self._settings = MeasureSettings(batch_size, seed, num_resamples)
        self._tokenizer = tokenizer
        self._prepared: list[ForcedRecall | TokenPerplexity | HarnessTask] = []
        prompts: ChatPrompts | None = None
        for name in tasks:
            if is_harness(name):
                harness = load_harness(
                    task_dir,
                    name,
                    tokenizer,
                    max_length=max_length,
                    stop_ids=[tokenizer.eos_token_id],
                    allow_code=allow_code,
                )
                _require_no_beams(harness)
                self._prepared.append(harness)
                continue
            (task,) = load_tasks([name], task_dir, tokenizer=tokenizer, max_rows=max_rows)
            if isinstance(task, TokenPerplexity):
                self._prepared.append(task)
                continue
            _require_exact(task)
            prompts = prompts or ChatPrompts(tokenizer)
            self._prepared.append(ForcedRecall(task, prompts))

    def evaluate(
        self, model: LikelihoodModel, collective: Collective | None = None
    ) -> list[Result]:
        """Measure all tasks on the model as it is now.

        Collective: every rank must call it.

        Args:
            model: The live model.
            collective: The processes that evaluate together; None for this one alone.

        Returns:
            Results in the order of the tasks, the same on all ranks.
        """
        return self.evaluate_with_samples(model, collective)[0]

    def evaluate_with_samples(
        self, model: LikelihoodModel, collective: Collective | None = None
    ) -> Measured:
        """Measure all tasks and return one record per question or row beside the results.

        Collective: every rank must call it.
        """
        results: list[Result] = []
        samples: list[SampleRecord] = []
        ranks = collective or SingleProcess()
        for prepared in self._prepared:
            target: Any = model
            if isinstance(prepared, HarnessTask):
                target = functools.partial(LiveBackend, target, self._tokenizer)
            measured = prepared.measure(target, ranks, self._settings)
            results += measured[0]
            samples += measured[1]
        return results, samples


def _require_no_beams(task: HarnessTask) -> None:
    """Refuse beams: on a sharded model every beam of every rank would be one more whole text."""
    if task.num_beams != 1:
        raise ConfigError(
            f"evaluate.live_tasks: {task.name!r} decodes with num_beams {task.num_beams}, which a"
            " model that is being trained does not; leave the task to the export."
        )


def _require_exact(task: ChatTask) -> None:
    if task.kind != "exact":
        raise ConfigError(
            f"evaluate.tasks: {task.name!r} is of kind {task.kind!r} and needs generated answers;"
            " in the training loop only perplexity and exact tasks are measured, the others on"
            " the source model before training and on the export after it."
        )


def evaluate_live(
    model: LikelihoodModel,
    tasks: Sequence[str],
    task_dir: Path,
    tokenizer: Any,
    collective: Collective | None = None,
    *,
    batch_size: int = 16,
    seed: int = 0,
    max_rows: int | None = None,
) -> list[Result]:
    """Measure perplexity and exact tasks on a live model once; see ``LiveEvaluator``.

    Collective: every rank must call it.
    """
    evaluator = LiveEvaluator(
        tasks, task_dir, tokenizer, batch_size=batch_size, seed=seed, max_rows=max_rows
    )
    return evaluator.evaluate(model, collective)

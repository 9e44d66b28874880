"""Measures of whole answers that are no single yes or no: chrF++, code-mixing, IFEval."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from forgetscale.errors import ConfigError
from forgetscale.evaluation.bootstrap import (
    Interval,
    bootstrap_mean,
    bootstrap_ratio,
    interval_seed,
)
from forgetscale.evaluation.forced import MeasureSettings
from forgetscale.evaluation.ifeval import follows, follows_loosely
from forgetscale.evaluation.ifeval_text import require_packages
from forgetscale.evaluation.mixing import METRICS, measure_mixing, require_identifiers
from forgetscale.evaluation.results import Result
from forgetscale.evaluation.tasks import ChatTask

Measures = tuple[list[Result], list[float]]
_CORPUS_RESAMPLES = 1000


def chrf_measures(task: ChatTask, answers: Sequence[str], settings: MeasureSettings) -> Measures:
    """Score answers against their references by chrF++, as a corpus and by mean sentence.

    The two differ; the SSU paper reports the mean of sentences. Values lie in 0..100. The signature
    of sacrebleu (``chrf_signature``) is recorded with the settings of an evaluation.

    Args:
        task: Task of kind ``chrf``.
        answers: One per question, in order.
        settings: Bootstrap.

    Returns:
        Results ``chrf++`` and ``chrf++_sentence``, and the score of each answer.
    """
    metric = chrf_metric()
    references = [list(question.answers) for question in task.questions]
    pairs = [(answer.strip(), each) for answer, each in zip(answers, references, strict=True)]
    scores = [float(metric.sentence_score(answer, each).score) for answer, each in pairs]
    widest = max(len(each) for each in references)
    columns = [[each[min(n, len(each) - 1)] for each in references] for n in range(widest)]
    corpus = float(metric.corpus_score([answer for answer, _ in pairs], columns).score)
    generator = interval_seed(settings.seed, f"{task.name}/sentence")
    mean = bootstrap_mean(np.array(scores), generator, num_resamples=settings.num_resamples)
    low, high = corpus_interval(metric, pairs, interval_seed(settings.seed, task.name))
    return [
        _result(task, "chrf++", Interval(corpus, low, high), len(scores), True),
        _result(task, "chrf++_sentence", mean, len(scores), True),
    ], scores


def _require_sacrebleu() -> None:
    if importlib.util.find_spec("sacrebleu") is None:
        raise ConfigError(
            "tasks of kind chrf need the package sacrebleu, which is not installed; run pip install"
            " 'forgetscale[eval]'."
        )


def chrf_metric() -> Any:
    """Return sacrebleu's chrF++."""
    from sacrebleu.metrics.chrf import CHRF

    return CHRF(word_order=2)


def chrf_signature() -> str:
    """Return sacrebleu's signature of what is computed here."""
    metric = chrf_metric()
    metric.corpus_score(["a"], [["a"]])
    return str(metric.get_signature())


def corpus_interval(
    metric: Any, pairs: Sequence[tuple[str, Sequence[str]]], generator: np.random.Generator
) -> tuple[float, float]:
    """Resample sentences: the corpus score is a function of summed statistics.

    Args:
        metric: From ``chrf_metric``.
        pairs: Each answer with its references.
        generator: Source of the resamples.
    """
    stats = np.array(
        [
            metric._extract_corpus_statistics([answer], [[r] for r in each])[0]
            for answer, each in pairs
        ]
    )
    drawn = generator.integers(0, len(stats), size=(_CORPUS_RESAMPLES, len(stats)))
    scores = [
        float(metric._compute_score_from_stats(stats[rows].sum(0).tolist()).score) for rows in drawn
    ]
    low, high = np.quantile(scores, [0.025, 0.975])
    return float(low), float(high)


def mixing_measures(task: ChatTask, answers: Sequence[str], settings: MeasureSettings) -> Measures:
    """Measure how much of the answers is in another language; see ``mixing``.

    Args:
        task: Task of kind ``language_mixing``; ``meta.language`` names the language.
        answers: One per question, in order.
        settings: Bootstrap.

    Returns:
        One result for each of ``mixing.METRICS``, and whether each answer is mixed.
    """
    found = [
        measure_mixing(answer, question.meta["language"])
        for question, answer in zip(task.questions, answers, strict=True)
    ]
    results = []
    for metric in METRICS:
        pairs = np.array([item.pair(metric) for item in found])
        if not pairs[:, 1].sum():
            pairs[:, 1] = 1.0  # nothing was said, so nothing is mixed
        whole = pairs[pairs[:, 1] > 0]
        generator = interval_seed(settings.seed, f"{task.name}/{metric}")
        interval = bootstrap_ratio(
            whole[:, 0], whole[:, 1], generator, num_resamples=settings.num_resamples
        )
        results.append(_result(task, metric, interval, len(found), False))
    return results, [float(item.mixed) for item in found]


def ifeval_measures(task: ChatTask, answers: Sequence[str], settings: MeasureSettings) -> Measures:
    """Count the answers that follow their instructions; see ``ifeval``.

    Args:
        task: Task of kind ``ifeval``.
        answers: One per question, in order.
        settings: Bootstrap.

    Returns:
        The four published results: share of prompts all of whose instructions are followed, and
        share of instructions, each strictly and loosely; and whether each prompt is, strictly.
    """
    results: list[Result] = []
    values: list[float] = []
    for mode, judge in (("strict", follows), ("loose", follows_loosely)):
        counts = np.array(
            [
                (sum(judge(check, answer) for check in question.checks), len(question.checks))
                for question, answer in zip(task.questions, answers, strict=True)
            ],
            dtype=np.float64,
        )
        whole = (counts[:, 0] == counts[:, 1]).astype(np.float64)
        values = values or whole.tolist()
        for level, top, bottom in (
            ("prompt", whole, np.ones(len(whole))),
            ("inst", counts[:, 0], counts[:, 1]),
        ):
            metric = f"{level}_level_{mode}_acc"
            generator = interval_seed(settings.seed, f"{task.name}/{metric}")
            interval = bootstrap_ratio(top, bottom, generator, num_resamples=settings.num_resamples)
            results.append(_result(task, metric, interval, len(whole), True))
    return results, values


def _result(task: ChatTask, metric: str, value: Interval, n: int, better: bool) -> Result:
    return Result(
        task=task.name,
        metric=metric,
        value=value.value,
        n=n,
        low=value.low,
        high=value.high,
        task_hash=task.task_hash,
        higher_is_better=better,
        kind=task.kind,
    )


MEASURES: dict[str, Callable[[ChatTask, Sequence[str], MeasureSettings], Measures]] = {
    "chrf": chrf_measures,
    "language_mixing": mixing_measures,
    "ifeval": ifeval_measures,
}
"""Kind of task -> what measures its answers together."""
_NEEDS: dict[str, Callable[[], object]] = {
    "chrf": _require_sacrebleu,
    "language_mixing": require_identifiers,
    "ifeval": require_packages,
}


def require_measure(kind: str) -> None:
    """Check, before a model is asked, that what judges its answers is installed.

    Args:
        kind: Kind of task.

    Raises:
        ConfigError: A package is missing.
    """
    if kind in _NEEDS:
        _NEEDS[kind]()

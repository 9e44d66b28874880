"""Relative degradation, as the SSU paper reports it, and which tasks it is averaged over."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean

from forgetscale.evaluation.results import Result

_HEADLINES = {"chrf": "chrf++_sentence"}
"""Kind of task -> the metric a task is known by, where that is not its first."""


def ability_name(result: Result) -> str:
    """Return the name of what was measured: the task, or ``bits_per_byte/NAME`` beside it."""
    if result.metric == "bits_per_byte":
        return f"bits_per_byte/{result.task.removeprefix('perplexity/')}"
    return result.task


def name_abilities(results: Sequence[Result]) -> dict[str, Result]:
    """Return results by ability name.

    A task with several metrics is known by one of them, its first unless ``_HEADLINES`` says
    otherwise; the others are named ``TASK METRIC`` and do not count in averages.

    Args:
        results: Of one model, each task's in the order they were measured.
    """
    heads: dict[str, str] = {}
    for result in results:
        if result.metric == _HEADLINES.get(result.kind, result.metric):
            heads.setdefault(ability_name(result), result.metric)
    named = {}
    for result in results:
        name = ability_name(result)
        named[name if heads.get(name) == result.metric else f"{name} {result.metric}"] = result
    return named


def is_target(name: str) -> bool:
    """Return whether an ability is of the target language: ``target*`` or ``*_target``.

    The folder of a task (``perplexity/target``) and the metric behind it do not matter.
    """
    last = name.partition(" ")[0].rpartition("/")[2]
    return last.startswith("target") or last.endswith("_target")


def is_averaged(result: Result) -> bool:
    """Return whether a result counts in the average over source tasks.

    The paper averages scores of monolingual source tasks. So target tasks, code-mixing (the paper
    reports it apart) and perplexities (they have no upper end) do not count.
    """
    return not (
        is_target(ability_name(result))
        or result.kind in ("perplexity", "code_mixing", "language_mixing")
        or result.task == "code_mixing"
        or result.metric in ("perplexity", "bits_per_byte")
    )


def relative_change(before: Result, after: Result) -> float | None:
    """Return ``(after - before) / before``, so that a negative number is always a loss.

    Where less is better the sign must be turned. A rate (over-refusal, code-mixing) is replaced by
    its complement, the share of good answers: 0.02 -> 0.12 refused is 0.98 -> 0.88 answered,
    -10.2 %. For perplexity and bits per byte it is ``(before - after) / before``.

    Args:
        before: Result of the source model.
        after: Result of the adapted model on the same task.

    Returns:
        Relative change, or None if the score before is 0, where it is not defined.

    Raises:
        ValueError: The results are of different tasks or task contents.

    Source:
        arXiv:2512.04844: (adapted - source) / source per task, averaged over source tasks. The
        treatment of metrics where less is better is ours; the paper has none among them.
    """
    if (before.task, before.metric, before.task_hash) != (
        after.task,
        after.metric,
        after.task_hash,
    ):
        raise ValueError(
            f"cannot compare {before.task} {before.metric} ({before.task_hash[:8]}) with"
            f" {after.task} {after.metric} ({after.task_hash[:8]}); evaluate both on one task"
        )
    old, new = before.value, after.value
    if not before.higher_is_better:
        if before.metric in ("perplexity", "bits_per_byte"):
            return (old - new) / old if old else None
        old, new = 1.0 - old, 1.0 - new
    return (new - old) / old if old else None


def relative_degradation(
    before: Mapping[str, Result], after: Mapping[str, Result]
) -> tuple[float | None, dict[str, float]]:
    """Return the average over source tasks and the relative change of every ability.

    Args:
        before: Ability name -> result of the source model.
        after: Ability name -> result of the adapted model.

    Returns:
        Average (None if no source task counts), and ability name -> relative change where it is
        defined.
    """
    changes: dict[str, float] = {}
    for name in _common(before, after):
        change = relative_change(before[name], after[name])
        if change is not None:
            changes[name] = change
    counted = [
        change
        for name, change in changes.items()
        if name == ability_name(before[name]) and is_averaged(before[name])
    ]
    return (fmean(counted) if counted else None), changes


def _common(before: Mapping[str, Result], after: Mapping[str, Result]) -> Iterable[str]:
    return [name for name in before if name in after]

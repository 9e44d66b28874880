"""Evaluated models side by side: every task with its interval, and what differs from the first.

Two intervals that overlap say little: both models answered the same questions. So the difference
to the first model is taken question by question (of texts: row by row) and resampled in pairs,
wherever a task's number is made of its records.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from forgetscale.artifact import read_manifest
from forgetscale.errors import DataError
from forgetscale.evaluation.bootstrap import (
    NUM_RESAMPLES,
    Interval,
    bootstrap_mean,
    interval_seed,
)
from forgetscale.evaluation.degradation import is_target, name_abilities
from forgetscale.evaluation.report.drawing import INK, method_styles, new_figure, to_svg
from forgetscale.evaluation.report.style import STYLE
from forgetscale.evaluation.report.tables import table
from forgetscale.evaluation.report.words import ability_label, interval, number
from forgetscale.evaluation.results import (
    RESULT_KIND,
    Result,
    SampleRecord,
    read_results,
    read_samples,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLUMNS = 3


@dataclass(frozen=True, slots=True)
class Evaluated:
    """A result folder as the page sees it.

    Attributes:
        name: What the model is called: the folder, with its parent where that is needed.
        results: Ability name -> result.
        samples: Task -> id -> record.
        made_by: What made the results.
    """

    name: str
    results: Mapping[str, Result]
    samples: Mapping[str, Mapping[str, SampleRecord]]
    made_by: Mapping[str, Any]


def read_evaluated(folders: Sequence[Path]) -> list[Evaluated]:
    """Read result folders, in order; the first is what the others are compared with.

    Args:
        folders: What ``forgetscale evaluate`` wrote, or ``results/source`` and ``results/final`` of
            runs.

    Raises:
        DataError: A folder holds no valid results, one is named twice, or a task differs.
    """
    paths = [Path(folder).resolve() for folder in folders]
    if len(set(paths)) < len(paths):
        raise DataError("a result folder is named twice; name each once.")
    found = []
    for path, name in zip(paths, _names(paths), strict=True):
        samples: dict[str, dict[str, SampleRecord]] = {}
        for record in read_samples(path):
            samples.setdefault(record.task, {})[record.id] = record
        made_by = read_manifest(path, RESULT_KIND)["made_by"]
        found.append(Evaluated(name, name_abilities(read_results(path)), samples, made_by))
    _require_same_tasks(found)
    return found


def _names(paths: Sequence[Path]) -> list[str]:
    """Return as much of each path as tells them apart: ``a`` and ``b``, or ``a/results/final``."""
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def _require_same_tasks(found: Sequence[Evaluated]) -> None:
    for one in found:
        for other in found[:1]:
            for name in set(one.results) & set(other.results):
                if one.results[name].task_hash != other.results[name].task_hash:
                    raise DataError(
                        f"task {name!r} was changed between {other.name} and {one.name}; evaluate"
                        " both on the same tasks."
                    )


def paired_difference(first: Evaluated, other: Evaluated, name: str) -> Interval | None:
    """Return how much an ability of another model lies above that of the first.

    Args:
        first: What is compared with.
        other: The other model.
        name: Ability name.

    Returns:
        The difference with its 95 % interval over questions, drawn in pairs; None where the number
        is not made of the records, such as a corpus score, or the records are not the same.
    """
    one, two = first.results.get(name), other.results.get(name)
    if one is None or two is None:
        return None
    ours, theirs = first.samples.get(one.task, {}), other.samples.get(two.task, {})
    if not ours or list(ours) != list(theirs):
        return None
    parts = [np.array([(r.value, r.weight) for r in part.values()]) for part in (ours, theirs)]
    generator = interval_seed(0, name)
    if one.metric in ("perplexity", "bits_per_byte"):
        return _paired_texts(one, two, parts, generator)
    for result, part in zip((one, two), parts, strict=True):
        if not np.isclose(part[:, 0].mean(), result.value, rtol=1e-9):
            return None
    return bootstrap_mean(parts[1][:, 0] - parts[0][:, 0], generator)


def _paired_texts(
    one: Result, two: Result, parts: Sequence[np.ndarray], generator: np.random.Generator
) -> Interval | None:
    """Return the difference of two perplexities, or bits per byte, of the same rows.

    Args:
        one: Result of the first model.
        two: Result of the other.
        parts: Nats and tokens of each row, ``[rows, 2]``, for both.
        generator: Source of the resamples.
    """
    if not np.array_equal(parts[0][:, 1], parts[1][:, 1]):
        return None
    nats = [float(part[:, 0].sum() / part[:, 1].sum()) for part in parts]
    # Bits per byte are nats per token times a number of the text alone.
    scale = one.value / nats[0] if one.metric == "bits_per_byte" else None

    def value(nats_per_token: float) -> float:
        return math.exp(nats_per_token) if scale is None else scale * nats_per_token

    if not np.allclose([value(each) for each in nats], [one.value, two.value], rtol=1e-6):
        return None
    gaps = []
    for _ in range(NUM_RESAMPLES):
        rows = generator.integers(0, len(parts[0]), len(parts[0]))
        sums = [part[rows].sum(axis=0) for part in parts]
        gaps.append(value(sums[1][0] / sums[1][1]) - value(sums[0][0] / sums[0][1]))
    low, high = np.quantile(gaps, [0.025, 0.975])
    return Interval(two.value - one.value, float(low), float(high))


def models_data(
    models: Sequence[Evaluated], title: str, made_by: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the numbers of the page: title, models, and abilities with a cell for each model.

    Args:
        models: At least one; the first is what the others are compared with.
        title: Heading.
        made_by: What made the page.
    """
    names = dict.fromkeys(name for model in models for name in model.results)
    ordered = sorted(names, key=lambda name: (is_target(name), "/" in name))
    return {
        "title": title,
        "models": [model.name for model in models],
        "abilities": [_row(name, models) for name in ordered],
        "versions": {model.name: dict(model.made_by.get("versions", {})) for model in models},
        "provenance": dict(made_by),
    }


def _row(name: str, models: Sequence[Evaluated]) -> dict[str, Any]:
    known = next(model.results[name] for model in models if name in model.results)
    cells = {}
    for model in models:
        result = model.results.get(name)
        if result is None:
            continue
        gap = None if model is models[0] else paired_difference(models[0], model, name)
        cells[model.name] = {
            "value": result.value,
            "low": result.low,
            "high": result.high,
            "n": result.n,
            "difference": None if gap is None else [gap.value, gap.low, gap.high],
        }
    return {
        "name": name,
        "metric": known.metric,
        "side": "target" if is_target(name) else "source",
        "higher_is_better": known.higher_is_better,
        "cells": cells,
    }


def verdict(row: Mapping[str, Any], model: str) -> str:
    """Return ``better``, ``worse`` or nothing, where the paired interval leaves out zero."""
    gap = row["cells"].get(model, {}).get("difference")
    if gap is None or gap[1] <= 0 <= gap[2]:
        return ""
    return "better" if (gap[0] > 0) == row["higher_is_better"] else "worse"


def models_plot(data: Mapping[str, Any]) -> str:
    """One panel per ability: a point with its interval per model; that of the first as a band."""
    # Of a task with several metrics only the one it is known by.
    rows = [row for row in data["abilities"] if _is_headline(row)]
    models = data["models"]
    lines = -(-len(rows) // _COLUMNS)
    figure, axes = new_figure(3.7 * _COLUMNS, lines * (0.8 + 0.24 * len(models)), lines, _COLUMNS)
    styles = method_styles(models)
    for index, ax in enumerate(axes.flat):
        if index < len(rows):
            _draw(ax, rows[index], models, styles, first_column=index % _COLUMNS == 0)
        else:
            ax.set_visible(False)
    return to_svg(figure, "Every task, one point with its 95% interval for each model")


def _draw(
    ax: Axes,
    row: Mapping[str, Any],
    models: Sequence[str],
    styles: Mapping[str, tuple[str, str]],
    *,
    first_column: bool,
) -> None:
    first = row["cells"].get(models[0])
    if first is not None:
        ax.axvspan(first["low"], first["high"], color=styles[models[0]][0], alpha=0.13, lw=0)
    for place, model in enumerate(models):
        cell = row["cells"].get(model)
        if cell is None:
            continue
        colour, mark = styles[model]
        ax.plot([cell["low"], cell["high"]], [place, place], color=colour, linewidth=1.6)
        filled = colour if place == 0 or verdict(row, model) else "white"
        ax.plot(cell["value"], place, mark, color=colour, markerfacecolor=filled, markersize=7)
    ax.set_yticks(range(len(models)), models if first_column else [""] * len(models), color=INK)
    ax.set_ylim(len(models) - 0.4, -0.6)
    ax.margins(x=0.12)
    ax.grid(False, axis="y")
    ax.locator_params(axis="x", nbins=4)
    better = "" if row["higher_is_better"] else " (lower is better)"
    ax.set_title(_label(row) + better, fontsize=9.5, color=INK, loc="left")


def render_models(data: Mapping[str, Any]) -> str:
    """Return the page.

    Args:
        data: From ``models_data``.
    """
    title, models = escape(str(data["title"])), data["models"]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f'<header><p class="kind">Evaluation · {len(models)} models, {len(data["abilities"])}'
        f' numbers</p><h1>{title}</h1><p class="headline">{"<br>".join(_sentences(data))}</p>'
        '</header>\n<section class="plots"><figure class="full"><figcaption><b>Every task, every'
        f" model.</b> Lines: 95% interval. Band: {escape(models[0])}. A filled mark differs from it"
        f" question by question; an open one may be noise.</figcaption>{models_plot(data)}"
        f"</figure></section>\n{_table(data)}\n{_made_by(data)}\n</main>\n</body>\n</html>\n"
    )


def _sentences(data: Mapping[str, Any]) -> list[str]:
    """Say for each model how many abilities are better and worse than the first's."""
    found = []
    for model in data["models"][1:]:
        verdicts = [verdict(row, model) for row in data["abilities"] if _is_headline(row)]
        compared = sum(
            row["cells"].get(model, {}).get("difference") is not None
            for row in data["abilities"]
            if _is_headline(row)
        )
        found.append(
            f"{escape(model)}: {verdicts.count('worse')} of {compared} tasks worse than"
            f" {escape(data['models'][0])}, {verdicts.count('better')} better."
        )
    return found


def _is_headline(row: Mapping[str, Any]) -> bool:
    return not row["name"].endswith(f" {row['metric']}")


def _label(row: Mapping[str, Any]) -> str:
    task = row["name"].removesuffix(f" {row['metric']}")
    return ability_label(task.removeprefix("lm_eval/"))


def _table(data: Mapping[str, Any]) -> str:
    models = data["models"]
    styles = method_styles(models)
    dots = {m: f'<span class="dot" style="background:{styles[m][0]}"></span>' for m in models}
    head = ["task", "metric", *(f"{dots[model]}{escape(model)}" for model in models)]
    rows = []
    for row in data["abilities"]:
        label = escape(_label(row))
        arrow = "" if row["higher_is_better"] else " ↓"
        cells = [_cell(row, model) for model in models]
        rows.append([label + arrow, escape(row["metric"]), *cells])
    return (
        "<section><h2>All numbers</h2><p>↓ marks what is better when less. Small: 95% interval;"
        f" difference to {escape(models[0])} with its paired interval, where the number is made"
        f" of questions or rows.</p>{table(head, rows, left=2)}</section>"
    )


def _cell(row: Mapping[str, Any], model: str) -> str:
    cell = row["cells"].get(model)
    if cell is None:
        return "–"
    text = f"<b>{number(cell['value'])}</b><small>{interval(cell['low'], cell['high'])}</small>"
    if cell["difference"] is not None:
        value, low, high = cell["difference"]
        sign = "+" if value >= 0 else ""
        kind = {"better": "yes", "worse": "no"}.get(verdict(row, model), "")
        text += f'<small class="{kind}">{sign}{number(value)} ({interval(low, high)})</small>'
    return text


def _made_by(data: Mapping[str, Any]) -> str:
    rows = [
        [escape(model), escape(", ".join(f"{k} {v}" for k, v in sorted(versions.items())))]
        for model, versions in data["versions"].items()
    ]
    return (
        f"<section><h2>Made by</h2>{table(['model', 'versions'], rows, left=2, kind='made')}"
        "</section>"
    )

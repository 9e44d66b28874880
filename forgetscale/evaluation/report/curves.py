"""Curves of the report: retention against target gain, and everything over steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from forgetscale.evaluation.report.drawing import (
    BEFORE,
    MUTED,
    axis_labels,
    legend,
    log_ticks,
    method_styles,
    new_figure,
    to_svg,
)
from forgetscale.evaluation.report.matched import envelope
from forgetscale.evaluation.report.runs import RECALL, TARGET
from forgetscale.evaluation.report.words import ability_label, is_rate, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_GRID_POINTS = 60
_LETTER_WIDTH = 0.015
"""Of a level's name, as a share of the narrower plot, with some air."""


def _by_method(runs: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    grouped: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        grouped.setdefault(run["method"], []).append(run)
    return grouped


def retention_key(data: Mapping[str, Any]) -> str | None:
    """Return the ability drawn against target gain: the compared one where it was measured."""
    runs = data["runs"]
    for name in (data["matched_ability"], RECALL, "bits_per_byte/source", "perplexity/source"):
        if any(name in point["values"] for run in runs for point in run["curve"]):
            return name
    return None


def _pairs(run: Mapping[str, Any], key: str) -> list[tuple[float, float]]:
    return [
        (point["values"][TARGET], point["values"][key])
        for point in run["curve"]
        if TARGET in point["values"] and key in point["values"]
    ]


def retention_plot(data: Mapping[str, Any], *, wide: bool = False) -> str | None:
    """Source ability against target perplexity, one curve per method with the band of its seeds.

    Args:
        data: Content of ``report.json``.
        wide: Draw for the whole width of the page instead of half of it.
    """
    runs = data["runs"]
    key = retention_key(data)
    curves = {
        method: [pairs for run in own if len(pairs := _pairs(run, key)) > 1]
        for method, own in _by_method(runs).items()
        if key is not None
    }
    curves = {method: own for method, own in curves.items() if own}
    if key is None or not curves:
        return None
    figure, axes = new_figure(11.1, 4.0) if wide else new_figure(5.6, 4.2)
    ax = axes[0, 0]
    styles = method_styles([entry["method"] for entry in data["summary"]])
    for method in curves:
        colour, mark = styles[method]
        _draw_band(ax, [envelope(pairs) for pairs in curves[method]], method, colour, mark)
    starts = [
        max(point[0] for point in pairs[1:2] or pairs) for own in curves.values() for pairs in own
    ]
    ends = [min(point[0] for point in pairs) for own in curves.values() for pairs in own]
    before = [pairs[0][1] for own in curves.values() for pairs in own]
    mean = sum(before) / len(before)
    ax.axhline(mean, color=BEFORE, linestyle=(0, (5, 3)), linewidth=1.2, zorder=1)
    ax.annotate(f"before {number(mean)}", (0.01, mean), xycoords=("axes fraction", "data"),
                ha="left", va="bottom", fontsize=9, color=MUTED)  # fmt: skip
    high, low = max(starts) * 1.12, min(ends) / 1.06
    ax.set_xscale("log")
    ax.set_xlim(high, low)
    log_ticks(ax.xaxis, low, high)
    if is_rate(key):
        ax.set_ylim(-0.03, max(1.05, mean * 1.05))
    if len(curves) > 1:
        _mark_levels(ax, data["matched_levels"], math.log(high / low))
    axis_labels(ax, "target perplexity (log scale; better to the right)", ability_label(key))
    legend(ax, loc="best")
    return to_svg(figure, f"{ability_label(key)} against target perplexity")


def _draw_band(
    ax: Axes, curves: Sequence[list[tuple[float, float]]], method: str, colour: str, mark: str
) -> None:
    """Draw the mean of a method's curves and, with several seeds, their range."""
    if len(curves) == 1:
        x, y = zip(*curves[0], strict=True)
        ax.plot(x, y, color=colour, marker=mark, markersize=4.5, linewidth=1.9, label=method)
        return
    high = min(curve[0][0] for curve in curves)
    low = max(curve[-1][0] for curve in curves)
    if not high > low:
        for curve in curves:
            x, y = zip(*curve, strict=True)
            ax.plot(x, y, color=colour, marker=mark, markersize=4, linewidth=1.2)
        ax.plot([], [], color=colour, marker=mark, label=method)
        return
    grid = np.geomspace(high, low, _GRID_POINTS)
    rows = np.stack(
        [
            np.interp(
                np.log(grid),
                np.log([point[0] for point in reversed(curve)]),
                [point[1] for point in reversed(curve)],
            )
            for curve in curves
        ]
    )
    ax.fill_between(grid, rows.min(axis=0), rows.max(axis=0), color=colour, alpha=0.14, linewidth=0)
    ax.plot(grid, rows.mean(axis=0), color=colour, marker=mark, markevery=8, markersize=4.5,
            linewidth=1.9, label=f"{method} ({len(curves)} seeds)")  # fmt: skip


def _mark_levels(ax: Axes, levels: Sequence[Mapping[str, Any]], width: float) -> None:
    """Name the levels above the plot; one too close to the name before it goes a line higher."""
    ends = [-math.inf, -math.inf]
    for level in levels:
        perplexity = level["target_perplexity"]
        place = -math.log(perplexity) / width  # grows to the right, 1 over the whole plot
        half = _LETTER_WIDTH * len(level["name"]) / 2
        line = 0 if place - half > ends[0] or place - half <= ends[1] else 1
        ends[line] = place + half
        ax.axvline(perplexity, color="#b8c1cb", linewidth=1, linestyle=":")
        ax.annotate(level["name"], (perplexity, 1.0), xytext=(0, 1 + 10 * line),
                    xycoords=("data", "axes fraction"), textcoords="offset points",
                    ha="center", va="bottom", fontsize=8.5, color=MUTED)  # fmt: skip


def steps_plot(data: Mapping[str, Any]) -> str | None:
    """Training loss, target perplexity and source ability over steps, one line per run."""
    runs = data["runs"]
    key = retention_key(data)
    panels = []
    if any(run["losses"] for run in runs):
        panels.append(("training loss (nats a token)", "losses"))
    for name in (TARGET, key):
        if name and any(name in p["values"] for run in runs for p in run["curve"] if p["step"]):
            panels.append((ability_label(name), name))
    if not panels:
        return None
    figure, axes = new_figure(11.1, 3.2, 1, 3)
    styles = method_styles([run["method"] for run in runs])
    for ax in axes[0, len(panels) :]:
        ax.set_visible(False)
    for ax, (label, name) in zip(axes[0], panels, strict=False):
        _draw_steps(ax, runs, name, styles)
        axis_labels(ax, "step", label)
    legend(axes[0, 0], loc="upper right")
    return to_svg(figure, "Training loss, target perplexity and source ability over steps")


def _draw_steps(
    ax: Axes,
    runs: Sequence[Mapping[str, Any]],
    name: str,
    styles: Mapping[str, tuple[str, str]],
) -> None:
    named: set[str] = set()
    values: list[float] = []
    for run in runs:
        if name == "losses":
            rows = [(step, loss) for step, loss in run["losses"]]
        else:
            rows = [(p["step"], p["values"][name]) for p in run["curve"] if name in p["values"]]
        if not rows:
            continue
        colour, mark = styles[run["method"]]
        x, y = zip(*rows, strict=True)
        values += y
        dense = name == "losses"
        ax.plot(x, y, color=colour, linewidth=1.1 if dense else 1.4, alpha=0.85,
                marker=None if dense else mark, markersize=3,
                label=None if run["method"] in named else run["method"])  # fmt: skip
        named.add(run["method"])
    if name == TARGET:
        ax.set_yscale("log")
        log_ticks(ax.yaxis, min(values) / 1.05, max(values) * 1.05)

"""Bars of the report: every ability before and after, and what is lost at matched points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from forgetscale.evaluation.report.drawing import (
    BEFORE,
    INK,
    MUTED,
    legend,
    method_styles,
    new_figure,
    to_svg,
)
from forgetscale.evaluation.report.runs import TARGET
from forgetscale.evaluation.report.words import ability_label, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLUMNS = 3


def abilities_plot(data: Mapping[str, Any]) -> str | None:
    """Every ability before and after adaptation, one small panel each."""
    summary = data["summary"]
    names = _panels(summary)
    if not names:
        return None
    rows = -(-len(names) // _COLUMNS)
    height = rows * (0.72 + 0.27 * (len(summary) + 1))
    figure, axes = new_figure(3.7 * _COLUMNS, height, rows, _COLUMNS)
    styles = method_styles([entry["method"] for entry in summary])
    for index, ax in enumerate(axes.flat):
        if index >= len(names):
            ax.set_visible(False)
            continue
        found = [
            (entry["method"], ability)
            for entry in summary
            if (ability := _ability(entry, names[index])) is not None
        ]
        _draw_ability(ax, names[index], found, styles)
    return to_svg(figure, "Every ability before and after adaptation, by method")


def _panels(summary: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the abilities to draw; bits per byte stand for the perplexity of the same text.

    Of a task with several metrics only the one it is known by is drawn.
    """
    names = list(
        dict.fromkeys(
            name
            for entry in summary
            for name, ability in entry["abilities"].items()
            if not name.endswith(f" {ability['metric']}")
        )
    )
    if any(entry["target"] for entry in summary):
        names.append(TARGET)
    return [
        name
        for name in names
        if name.replace("perplexity/", "bits_per_byte/") not in names
        or not name.startswith("perplexity/")
    ]


def _ability(entry: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    ability = entry["target"] if name == TARGET else entry["abilities"].get(name)
    return ability  # type: ignore[no-any-return]


def _draw_ability(
    ax: Axes,
    name: str,
    found: Sequence[tuple[str, Mapping[str, Any]]],
    styles: Mapping[str, tuple[str, str]],
) -> None:
    first = found[0][1]
    rows = [("before", BEFORE, first["before"], first["before_low"], first["before_high"])]
    if len(found) > 1:
        mean = sum(ability["before"] for _, ability in found) / len(found)
        rows = [("before", BEFORE, mean, first["before_low"], first["before_high"])]
    rows += [
        (method, styles[method][0], ability["after"], ability["low"], ability["high"])
        for method, ability in found
    ]
    for place, (_, colour, value, low, high) in enumerate(rows):
        ax.barh(place, value, color=colour, height=0.64)
        end = value
        if low is not None and high is not None:
            low, end = max(0.0, low), max(value, high)
            ax.plot([low, high], [place, place], color=INK, linewidth=1.1, solid_capstyle="butt")
        ax.annotate(number(value), (end, place), xytext=(4, 0), textcoords="offset points",
                    va="center", fontsize=8.5, color=INK, zorder=5,
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8})  # fmt: skip
    ax.axvline(rows[0][2], color=INK, linestyle=(0, (4, 2)), linewidth=0.9, zorder=4)
    ax.set_yticks(range(len(rows)), [row[0] for row in rows], color=INK)
    ax.invert_yaxis()
    ax.grid(False, axis="y")
    better = "" if first["higher_is_better"] else " (lower is better)"
    ax.set_title(ability_label(name) + better, fontsize=9.5, color=INK, loc="left")
    largest = max(max(row[2], row[4] or 0.0) for row in rows)
    ax.set_xlim(0, (largest or 1.0) * 1.2)
    ax.locator_params(axis="x", nbins=4)
    if first["metric"] in ("accuracy", "rate") and largest > 0.5:
        ax.set_xticks([0, 0.25, 0.5, 0.75, 1.0], ["0", "0.25", "0.5", "0.75", "1"])


def matched_plot(data: Mapping[str, Any]) -> str | None:
    """What is lost at the matched target perplexities, bars per method with intervals."""
    levels = data["matched_levels"]
    if len(data["summary"]) < 2:
        return None
    entries = [
        entry
        for entry in data["summary"]
        if any(point["lost"] for point in entry["matched_points"])
    ]
    if not levels or not entries:
        return None
    figure, axes = new_figure(5.6, 4.2)
    ax = axes[0, 0]
    width = 0.8 / len(entries)
    styles = method_styles([entry["method"] for entry in data["summary"]])
    for index, entry in enumerate(entries):
        colour = styles[entry["method"]][0]
        for place, point in enumerate(entry["matched_points"]):
            loss = point["lost"]
            if loss is None:
                continue
            x = place + (index - (len(entries) - 1) / 2) * width
            ax.bar(x, loss["mean"], width * 0.88, color=colour,
                   label=entry["method"] if place == 0 else None)  # fmt: skip
            if loss["low"] is not None:
                ax.plot([x, x], [loss["low"], loss["high"]], color=INK, linewidth=1.1)
    ax.set_xticks(
        range(len(levels)),
        [f"{level['name']}\nperplexity {number(level['target_perplexity'])}" for level in levels],
        color=INK,
    )
    ax.grid(False, axis="x")
    ax.axhline(0, color=MUTED, linewidth=0.8)
    what = ability_label(data["matched_ability"])
    ax.set_ylabel(f"{what}, lost (lower is better)", fontsize=10, color=INK)
    legend(ax, loc="upper left")
    ax.set_ylim(top=ax.get_ylim()[1] * 1.25)
    return to_svg(figure, f"Loss of {what} at matched target perplexity, by method")

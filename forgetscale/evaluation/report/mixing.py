"""What is kept against how much other text is mixed into the target data, at equal target score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from forgetscale.evaluation.report.drawing import (
    INK,
    MUTED,
    axis_labels,
    method_styles,
    new_figure,
    to_svg,
)
from forgetscale.evaluation.report.matched import Level
from forgetscale.evaluation.report.runs import Run
from forgetscale.evaluation.report.seeds import mean_with_seeds
from forgetscale.evaluation.report.words import ability_label, is_rate, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LINES = ("-", (0, (4, 2)), (0, (1, 1.5)), "-.")
"""So that curves that lie on each other can be told apart."""

Values = Mapping[str, Mapping[int, Sequence[float | None]]]
"""Method -> seed -> value at each level."""


def mixing_data(
    runs: Sequence[Run], levels: Sequence[Level], kept: Values, control: str
) -> dict[str, Any]:
    """Return each family of mixtures by its shares, and what stands beside it.

    Methods whose names differ only behind ``@`` are a family. Its share is measured: that of
    target tokens, over the whole run, that came from other sets than the first one.

    Args:
        runs: All runs of the report.
        levels: Matched target perplexities.
        kept: The compared ability at each level.
        control: Unprotected method, which has share 0 of everything.

    Returns:
        ``families`` -> name -> points from the least share to the largest, each with ``method``,
        ``share`` and ``kept`` (one mean over seeds a level, with its seeds); ``beside``: the same
        of methods without a mixture, without a share. Empty if no family has two shares.
    """
    shares: dict[str, list[float]] = {}
    for run in runs:
        if run.mixed_share is not None:
            shares.setdefault(run.method, []).append(run.mixed_share)
    families: dict[str, list[dict[str, Any]]] = {}
    for method, found in sorted(shares.items(), key=lambda item: fmean(item[1])):
        point = {
            "method": method,
            "share": fmean(found),
            "kept": _kept(kept[method], len(levels)),
        }
        families.setdefault(method.partition("@")[0], []).append(point)
    if not levels or all(len(points) < 2 for points in families.values()):
        return {}
    methods = dict.fromkeys(run.method for run in runs)
    beside = [
        {"method": method, "kept": _kept(kept[method], len(levels))}
        for method in methods
        if method not in shares
    ]
    return {"control": control, "families": families, "beside": beside}


def _kept(values: Mapping[int, Sequence[float | None]], count: int) -> list[dict[str, Any] | None]:
    return [
        mean_with_seeds(
            {seed: value for seed, row in values.items() if (value := row[index]) is not None}
        )
        for index in range(count)
    ]


def mixing_plot(data: Mapping[str, Any]) -> str | None:
    """Draw the compared ability over the share of mixed text, a panel for each matched point.

    Args:
        data: Content of ``report.json``.
    """
    mixing = data["mixing"]
    if not mixing:
        return None
    levels = data["matched_levels"]
    figure, axes = new_figure(11.1, 3.9, 1, len(levels))
    styles = method_styles([entry["method"] for entry in data["summary"]])
    label = ability_label(data["matched_ability"])
    for index, (ax, level) in enumerate(zip(axes[0], levels, strict=True)):
        _draw_level(ax, mixing, index, styles)
        where = f"{level['name']}, perplexity {number(level['target_perplexity'])}"
        ax.set_title(where, fontsize=9.5, color=MUTED)
        axis_labels(ax, "share of target tokens mixed in", f"{label} kept" if index == 0 else "")
        ax.set_xlim(-0.03, 1.0)
        if is_rate(data["matched_ability"]):
            ax.set_ylim(-0.03, 1.05)
    handles = axes[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncol=6, frameon=False, fontsize=9,
                  labelcolor=INK)  # fmt: skip
    return to_svg(figure, f"{label} kept against the share of mixed text at equal target score")


def _draw_level(
    ax: Axes, mixing: Mapping[str, Any], index: int, styles: Mapping[str, tuple[str, str]]
) -> None:
    beside = {entry["method"]: entry["kept"][index] for entry in mixing["beside"]}
    start = beside.pop(mixing["control"], None)
    for family, (name, points) in enumerate(mixing["families"].items()):
        drawn = [(point["share"], point["kept"][index]) for point in points]
        drawn = [(share, value) for share, value in drawn if value is not None]
        if not drawn:
            continue
        colour, mark = styles[points[len(points) // 2]["method"]]
        for share, value in drawn:
            seeds = list(value["seeds"].values())
            ax.plot([share] * len(seeds), seeds, linestyle="", marker=".", markersize=4,
                    color=colour, alpha=0.55)  # fmt: skip
        line = [(share, value["mean"]) for share, value in drawn]
        if len(points) > 1 and start is not None:
            line.insert(0, (0.0, start["mean"]))
        x, y = zip(*line, strict=True)
        ax.plot(x, y, color=colour, marker=mark, markersize=6, linewidth=1.9, label=name,
                linestyle=_LINES[family % len(_LINES)])  # fmt: skip
    if start is not None:
        seeds = list(start["seeds"].values())
        ax.plot([0.0] * len(seeds), seeds, linestyle="", marker=".", markersize=4,
                color=styles[mixing["control"]][0], alpha=0.55)  # fmt: skip
        ax.plot([0.0], [start["mean"]], color=styles[mixing["control"]][0], marker="o",
                markersize=7, linestyle="", label=f"{mixing['control']} (share 0)")  # fmt: skip
    for method, value in beside.items():
        if value is not None:
            ax.axhline(value["mean"], color=styles[method][0], linestyle=(0, (5, 3)),
                       linewidth=1.4, label=method)  # fmt: skip

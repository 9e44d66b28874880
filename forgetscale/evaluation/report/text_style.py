"""How foreign the target data are to the source model, and how far training moved it.

The numbers are those of ``forgetscale generate --style``, kept in a run's ``results/style.json``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forgetscale.errors import DataError
from forgetscale.evaluation.report.drawing import (
    BEFORE,
    INK,
    MUTED,
    axis_labels,
    legend,
    method_styles,
    new_figure,
    to_svg,
)
from forgetscale.evaluation.report.seeds import mean_with_seeds

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from forgetscale.evaluation.report.runs import Run

STYLE_FILE = "style.json"
_WHOLE = "all"
_FIELDS = ("nll", "cosine")


def read_style(results: Path) -> Mapping[str, Any]:
    """Return what was measured of a run's style and drift; empty if nothing was.

    Args:
        results: Folder ``results`` of a run.

    Raises:
        DataError: The file is damaged.
    """
    path = results / STYLE_FILE
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON ({error}); measure the style again.") from error
    if not isinstance(found, dict) or any(name not in found for name in _FIELDS):
        raise DataError(f"{path} is not what forgetscale generate --style writes; remove it.")
    return found


def style_data(runs: Sequence[Run]) -> dict[str, Any]:
    """Return surprise by set, gradient cosine by pair of sets and layer, and drift by method.

    Surprise and cosine are of the source model: runs of one seed share them, and count once.

    Args:
        runs: All runs of the report.
    """
    measured = [run for run in runs if run.style]
    if not measured:
        return {}
    nll: dict[str, dict[int, float]] = {}
    cosine: dict[str, dict[str, dict[int, float]]] = {}
    drift: dict[str, dict[int, float]] = {}
    for run in measured:
        for name, value in run.style["nll"].items():
            nll.setdefault(name, {})[run.seed] = value
        for pair, layers in run.style["cosine"].items():
            for layer, value in layers.items():
                cosine.setdefault(pair, {}).setdefault(layer, {})[run.seed] = value
        if "drift" in run.style:
            drift.setdefault(run.method, {})[run.seed] = run.style["drift"][_WHOLE]
    return {
        "nll": {name: mean_with_seeds(seeds) for name, seeds in nll.items()},
        "cosine": {
            pair: {name: mean_with_seeds(layers[name]) for name in sorted(layers, key=_layer_key)}
            for pair, layers in cosine.items()
        },
        "drift": {method: mean_with_seeds(seeds) for method, seeds in drift.items()},
    }


def _layer_key(name: str) -> tuple[bool, int, str]:
    """Sort layers by number, the rest of the model and the whole behind them."""
    return (not name.isdigit(), int(name) if name.isdigit() else 0, "~" if name == _WHOLE else name)


def style_plot(data: Mapping[str, Any]) -> str | None:
    """Draw surprise, gradient cosine and drift side by side.

    Args:
        data: Content of ``report.json``.
    """
    style = data["style"]
    if not style:
        return None
    drift = style["drift"]
    figure, axes = new_figure(11.1, max(2.8, 1.3 + 0.24 * len(drift)), 1, 3)
    surprise, cosine, moved = axes[0]
    bars = {name: (value, BEFORE) for name, value in style["nll"].items()}
    _draw_bars(surprise, bars, "surprise of the source model (nats a token)")
    _draw_cosines(cosine, style["cosine"])
    styles = method_styles([entry["method"] for entry in data["summary"]])
    bars = {method: (value, styles[method][0]) for method, value in drift.items()}
    _draw_bars(moved, bars, "distance from the source weights, relative")
    moved.set_visible(bool(drift))
    return to_svg(
        figure, "Surprise of the data, gradient cosine between sets, and drift of weights"
    )


def _draw_bars(ax: Axes, bars: Mapping[str, tuple[Mapping[str, Any], str]], label: str) -> None:
    names = list(bars)
    for place, (value, colour) in enumerate(bars.values()):
        ax.barh(place, value["mean"], color=colour, height=0.62, alpha=0.85)
        seeds = list(value["seeds"].values())
        ax.plot(seeds, [place] * len(seeds), linestyle="", marker=".", color=INK, markersize=5)
    ax.set_yticks(range(len(names)), names, fontsize=9, color=INK)
    ax.invert_yaxis()
    ax.grid(False, axis="y")
    axis_labels(ax, label, "")


def _draw_cosines(ax: Axes, cosine: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
    """Draw the cosine of each pair of sets by layer; the whole model stands last."""
    names: list[str] = []
    for pair, layers in cosine.items():
        names = list(layers)
        values = [layer["mean"] for layer in layers.values()]
        ax.plot(range(len(values)), values, marker="o", markersize=4.5, linewidth=1.4,
                label=pair.replace("|", " and "))  # fmt: skip
        for place, layer in enumerate(layers.values()):
            seeds = list(layer["seeds"].values())
            ax.plot([place] * len(seeds), seeds, linestyle="", marker=".", color=INK, markersize=4)
    ax.axhline(0.0, color=MUTED, linewidth=1)
    ax.set_xticks(range(len(names)), names, fontsize=9)
    ax.set_ylim(-1.05, 1.05)
    axis_labels(ax, "layer", "cosine between gradients")
    legend(ax, loc="best")

"""What all plots share: colours and marks safe for colour-blind, axes, inline SVG."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from forgetscale.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID, BEFORE = "#1d2733", "#5b6775", "#e3e8ee", "#8a94a0"
# Okabe and Ito's colours, with a mark of its own for each method
_STYLES = {
    "sft": ("#d55e00", "o"),
    "hft": ("#e69f00", "D"),
    "ssu/rand": ("#6b7280", "s"),
    "ssu/mag_l1": ("#56b4e9", "v"),
    "ssu/mag_l2": ("#009e73", "^"),
    "ssu/official": ("#cc79a7", "P"),
    "ssu/paper": ("#0072b2", "o"),
    "freeze_layers": ("#000000", "X"),
    "selfdialogue/hard@0.25": ("#7fb8da", "v"),
    "selfdialogue/hard@0.5": ("#2e86c1", "s"),
    "selfdialogue/hard@0.75": ("#08457e", "^"),
    "selfdialogue/soft@0.25": ("#8fd19e", "v"),
    "selfdialogue/soft@0.5": ("#35a35b", "P"),
    "selfdialogue/soft@0.75": ("#00582c", "^"),
    "external@0.5": ("#e69f00", "D"),
    "replay@0.5": ("#6b7280", "h"),
}
_SPARE = (
    ("#000000", "X"),
    ("#8c6d31", "<"),
    ("#7a4fa3", ">"),
    ("#a8323e", "h"),
    ("#4d7c0f", "*"),
    ("#0f766e", "d"),
    ("#db2777", "p"),
    ("#92400e", "8"),
)
_MOST_INSIDE = 6
"""Entries of a legend that fit inside the axes."""


def method_styles(methods: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Return colour and mark of each method: fixed for known ones, so that reports look alike."""
    spare = iter(_SPARE * (1 + len(methods) // len(_SPARE)))
    return {
        method: _STYLES[method] if method in _STYLES else next(spare)
        for method in dict.fromkeys(methods)
    }


def require_matplotlib() -> None:
    """Check that plots can be drawn.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "report: plots need matplotlib, which is not installed; run"
            " pip install 'forgetscale[report]'."
        ) from error


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, Any]:
    """Return a figure (inches) and its ``[rows, columns]`` axes in the look of the report."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams["svg.fonttype"] = "none"
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color("#b8c1cb")
        ax.tick_params(colors=MUTED, labelsize=9, length=3)
        ax.grid(True, color=GRID, linewidth=0.8)
        ax.set_axisbelow(True)
    return figure, axes


def to_svg(figure: Figure, label: str) -> str:
    """Return a figure as an SVG element that names no other file and no address."""
    from matplotlib import rcParams

    rcParams["svg.hashsalt"] = label
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    text = text.replace("xlink:href", "href")
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    safe = label.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return text.replace("<svg", f'<svg role="img" aria-label="{safe}"', 1)


def axis_labels(ax: Axes, x_label: str, y_label: str) -> None:
    """Name both axes."""
    ax.set_xlabel(x_label, fontsize=10, color=INK)
    ax.set_ylabel(y_label, fontsize=10, color=INK)


_TICK_STEPS = (
    (1, 1.2, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 6, 7, 8, 9),
    (1, 1.5, 2, 3, 4, 5, 7),
    (1, 2, 3, 5),
    (1, 3),
    (1,),
)
_MOST_TICKS = 7


def log_ticks(axis: Any, low: float, high: float) -> None:
    """Write plain numbers along a log axis from ``low`` to ``high``, a handful of them."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    exponents = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    for steps in _TICK_STEPS:
        ticks = [step * 10.0**exponent for exponent in exponents for step in steps]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) <= _MOST_TICKS:
            break
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def legend(ax: Axes, **options: Any) -> None:
    """Add a legend without a frame; a long one stands below the figure."""
    names = ax.get_legend_handles_labels()[1]
    if len(names) <= _MOST_INSIDE:
        ax.legend(frameon=False, fontsize=9, labelcolor=INK, **options)
        return
    figure = ax.get_figure(root=True)
    assert figure is not None
    width, height = figure.get_size_inches()
    columns = max(2, int(width // 1.9))
    rows = -(-len(names) // columns)
    figure.set_size_inches(width, height + 0.2 * rows)
    figure.legend(
        *ax.get_legend_handles_labels(),
        loc="outside lower center",
        ncol=columns,
        frameon=False,
        fontsize=8.5,
        labelcolor=INK,
    )

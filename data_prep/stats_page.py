"""The page of ``stats``: what a token set holds, drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Integer

from data_prep.page import figure, page, section, table
from data_prep.reports import collect_stats, stat_lines
from forgetscale.data import TokenSet
from forgetscale.evaluation.report.drawing import (
    INK,
    axis_labels,
    new_figure,
    require_matplotlib,
    to_svg,
)

_COLOUR = "#0072b2"
_MOST_SOURCES = 20


def _histogram(
    ax: Any, values: Integer[np.ndarray, " n"], edges: np.ndarray, title: str, label: str
) -> None:
    counts, edges = np.histogram(values, bins=edges)
    ax.bar(edges[:-1], counts, np.diff(edges), align="edge", color=_COLOUR,
           edgecolor="white", linewidth=0.5)  # fmt: skip
    ax.grid(False, axis="x")
    ax.set_title(title, fontsize=10, color=INK, loc="left")
    axis_labels(ax, label, "")
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def _whole_bins(largest: int, most: int) -> np.ndarray:
    """Return edges of bins of equal whole width from 0 or 1 to ``largest``."""
    width = -(-max(1, largest) // most)
    return np.arange(1, largest + width + 1, width) - 0.5


def _plot(token_set: TokenSet) -> str:
    require_matplotlib()
    lens = token_set.document_lens(range(token_set.num_rows)).numpy()
    pieces, real = (lens > 0).sum(1), lens.sum(1)
    fig, axes = new_figure(11, 3.1, 1, 3)
    size = token_set.block_size
    _histogram(axes[0, 0], lens[lens > 0], _whole_bins(size, 32),
               "document pieces by length", "tokens")  # fmt: skip
    _histogram(axes[0, 1], pieces, _whole_bins(int(pieces.max()), 24),
               "rows by documents in them", "document pieces")  # fmt: skip
    _histogram(axes[0, 2], size - real, _whole_bins(int(max(1, (size - real).max())), 24) - 1,
               "rows by padding", "padding tokens")  # fmt: skip
    return to_svg(fig, "Lengths of document pieces, pieces per row and padding per row")


def _sources_plot(sources: list[dict[str, Any]]) -> str:
    shown = sorted(sources, key=lambda source: -source["num_documents"])[:_MOST_SOURCES]
    fig, axes = new_figure(11, 0.6 + 0.28 * len(shown))
    ax = axes[0, 0]
    names = [Path(source["path"]).name for source in shown]
    values = [source["num_documents"] for source in shown]
    ax.barh(range(len(shown)), values, 0.7, color=_COLOUR)
    for place, value in enumerate(values):
        ax.annotate(f"{value:,}", (value, place), xytext=(4, 0), textcoords="offset points",
                    va="center", fontsize=8.5, color=INK)  # fmt: skip
    ax.set_yticks(range(len(shown)), names, color=INK)
    ax.invert_yaxis()
    ax.grid(False, axis="y")
    ax.set_xlim(0, max([1, *values]) * 1.1)
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    return to_svg(fig, "Documents of each source file")


def stats_page(directory: Path) -> str:
    """Return the page about a token set.

    Args:
        directory: Token set folder.

    Raises:
        DataError: There is no valid token set, or it is damaged.
    """
    token_set = TokenSet(directory)
    stats = collect_stats(directory)
    shares = stats["row_shares"]
    headline = f"{stats['rows']:,} rows of {stats['block_size']} tokens from"
    headline += f" {stats['documents']:,} documents"
    if shares:
        headline += (
            f"; {shares['cut_share']:.1%} of the documents are cut,"
            f" {shares['padding_share']:.2%} of the rows is padding"
        )
    parts = [figure(_plot(token_set), "Rows,", f"packed by {stats['packing']}.")]
    if stats["sources"]:
        caption = f"documents of each; the largest {_MOST_SOURCES} are shown."
        parts.append(figure(_sources_plot(stats["sources"]), "Sources,", caption))
    rows = [[name, value] for name, value in stat_lines(stats)]
    parts.append(section("Numbers", table(["what", "value"], rows, left=2)))
    return page("Token set", directory.resolve().name, headline + ".", parts)

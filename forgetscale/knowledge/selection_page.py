"""The page of a selection: development scores by fraction, test scores of the picks."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from forgetscale.evaluation.report.drawing import (
    INK,
    MUTED,
    axis_labels,
    legend,
    new_figure,
    to_svg,
)
from forgetscale.evaluation.report.style import STYLE
from forgetscale.evaluation.report.tables import table

FAMILIES: Mapping[str, tuple[str, str]] = {
    "restored": ("#d55e00", "o"),
    "scaled": ("#0072b2", "s"),
    "absolute": ("#009e73", "^"),
    "relative": ("#56b4e9", "v"),
    "base": ("#cc79a7", "P"),
    "random": ("#6b7280", "x"),
    "bottom": ("#8c6d31", "D"),
    "top": ("#8c6d31", "D"),
}
"""Colour and mark of each kind of edit."""


def page(title: str, body: str) -> str:
    """Return a self-contained page in the look of the reports."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n"
        "</main>\n</body>\n</html>\n"
    )


def cell(value: Mapping[str, float], *, signed: bool = False) -> str:
    """Return a share with its interval below it."""
    sign = "+" if signed else ""
    return (
        f"<b>{value['value']:{sign}.3f}</b>"
        f"<small>{value['low']:{sign}.3f} to {value['high']:{sign}.3f}</small>"
    )


def render(data: Mapping[str, Any]) -> str:
    """Return the page.

    Args:
        data: Content of ``selection.json``.
    """
    task = next(iter(data["differences"]))
    gain = data["differences"][task]["tuned"]
    choice = data["chosen"]["restored"]
    picked = (
        "no restoration: the model as tuned was best"
        if choice["fraction"] == 0
        else f"to restore {100 * choice['fraction']:g} %"
    )
    top = (
        f'<header><p class="kind">{escape(data["source"])} → {escape(data["tuned"])}</p>'
        f"<h1>{escape(data['title'])}</h1>"
        f'<p class="headline">Development questions choose {picked}. On {escape(task)} that changes'
        f" accuracy by {gain['value']:+.3f} ({gain['low']:+.3f} to {gain['high']:+.3f}).</p>"
        "</header>"
    )
    figure = (
        '<section class="plots"><figure class="full"><figcaption><b>Development score by'
        " fraction.</b> Controls at the same fraction; scaled: the whole change made smaller until"
        f" it is as long as what restoration leaves.</figcaption>{_plot(data)}</figure></section>"
    )
    return page(str(data["title"]), "\n".join([top, figure, _tests(data), _differences(data)]))


def _plot(data: Mapping[str, Any]) -> str:
    figure, axes = new_figure(9.0, 4.0)
    ax = axes[0, 0]
    for family in dict.fromkeys(row["family"] for row in data["models"]):
        rows = sorted((r["fraction"], r["dev"]) for r in data["models"] if r["family"] == family)
        rows = [(0.0, data["dev_score"]["tuned"]), *rows]
        colour, mark = FAMILIES[family]
        ax.plot(*zip(*rows, strict=True), color=colour, marker=mark, linewidth=1.6, markersize=5,
                label=family)  # fmt: skip
    ax.axhline(data["dev_score"]["source"], color=MUTED, linestyle=(0, (4, 3)), linewidth=1.0)
    ax.annotate("source", (0, data["dev_score"]["source"]), fontsize=8.5, color=INK)
    axis_labels(ax, "fraction put back", "good answers to development questions")
    legend(ax, loc="best")
    return to_svg(figure, "Development score by fraction and kind of edit")


def _tests(data: Mapping[str, Any]) -> str:
    tasks = list(data["test"])
    rows = []
    for name in data["test"][tasks[0]]:
        choice = data["chosen"].get(name)
        shown = "" if choice is None else f"{choice['fraction']:g}"
        rows.append([escape(name), shown, *(cell(data["test"][task][name]) for task in tasks)])
    head = ["model", "fraction chosen", *map(escape, tasks)]
    return f"<section><h2>Test questions</h2>{table(head, rows)}</section>"


def _differences(data: Mapping[str, Any]) -> str:
    tasks = list(data["differences"])
    first = data["differences"][tasks[0]]
    rows = [["tuned", *(cell(data["differences"][t]["tuned"], signed=True) for t in tasks)]]
    for key, words in (("chosen", "own best"), ("same_fraction", "same fraction")):
        for family in first[key]:
            cells = [cell(data["differences"][t][key][family], signed=True) for t in tasks]
            rows.append([f"{escape(family)}, {words}", *cells])
    head = ["restored minus", *map(escape, tasks)]
    return (
        f"<section><h2>What restoration gains</h2>{table(head, rows)}"
        '<p class="note">95 % bootstrap intervals over questions, paired.</p></section>'
    )

"""The page about a change: one self-contained HTML file, drawn from ``delta.json``."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from forgetscale.evaluation.report.drawing import (
    MUTED,
    axis_labels,
    legend,
    log_ticks,
    new_figure,
    to_svg,
)
from forgetscale.evaluation.report.style import STYLE
from forgetscale.evaluation.report.tables import table

_MEASURES = {
    "sum_r": ("sum of |d| / (|source| + eps)", "#d55e00", "o"),
    "sum_abs": ("sum of |d|", "#0072b2", "s"),
    "sum_sq": ("sum of d²", "#009e73", "^"),
}


def render(data: Mapping[str, Any]) -> str:
    """Return the page.

    Args:
        data: Content of ``delta.json``.
    """
    title = escape(str(data["title"]))
    body = "\n".join([_top(data), _plots(data), _share_table(data), *_tables(data), _made(data)])
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n"
        "</main>\n</body>\n</html>\n"
    )


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f} %"


def _top(data: Mapping[str, Any]) -> str:
    model, status = data["model"], "bad" if data["verdict"]["different"] else "open"
    largest = data["shares"][-1] if len(data["shares"]) < 5 else data["shares"][4]
    return (
        f'<header><p class="kind">{escape(data["source"])} → {escape(data["tuned"])}</p>'
        f"<h1>{escape(str(data['title']))}</h1>"
        f'<p class="headline">The {_percent(largest["fraction"])} most changed weights (relative to'
        f" their size) hold {_percent(largest['sum_r'])} of the relative change, but"
        f" {_percent(largest['sum_abs'])} of sum |d| and {_percent(largest['sum_sq'])} of"
        f" sum d². The change as a whole is {_percent(model['relative_norm'])} of the source;"
        f" {_percent(model['unchanged'])} of {model['elements']:,} weights did not change.</p>"
        f'<p class="verdict {status}">{escape(data["verdict"]["sentence"])}</p></header>'
    )


def _plots(data: Mapping[str, Any]) -> str:
    figures = [
        (_share_plot(data), "Who holds the change",
         "Share held by the elements of largest relative change; dashed: a random update of the"
         " same size."),
        (_layer_plot(data), f"Where the top {data['enrichment_fraction']} lies",
         "Share of the most changed elements over share of all elements, by layer; 1 is even."),
    ]  # fmt: skip
    return '<section class="plots">' + "".join(
        f"<figure><figcaption><b>{head}.</b> {escape(text)}</figcaption>{svg}</figure>"
        for svg, head, text in figures
        if svg
    ) + "</section>"  # fmt: skip


def _share_plot(data: Mapping[str, Any]) -> str:
    figure, axes = new_figure(5.6, 4.2)
    ax = axes[0, 0]
    x = [100 * row["fraction"] for row in data["shares"]]
    for name, (label, colour, mark) in _MEASURES.items():
        ax.plot(x, [100 * row[name] for row in data["shares"]], color=colour, marker=mark,
                markersize=4.5, linewidth=1.9, label=label)  # fmt: skip
        ax.plot(x, [100 * row[name] for row in data["null"]["shares"]], color=colour,
                linestyle=(0, (4, 3)), linewidth=1.2)  # fmt: skip
    ax.set_xscale("log")
    log_ticks(ax.xaxis, min(x), max(x))
    ax.set_ylim(0, 103)
    axis_labels(ax, "most changed elements (%, log scale)", "share held (%)")
    legend(ax, loc="best")
    return to_svg(figure, "Share of the change held by the most changed elements")


def _layer_plot(data: Mapping[str, Any]) -> str | None:
    rows = [row for row in data["layers"] if row["name"].startswith("layer ")]
    rows = sorted(
        (row for row in rows if row["enrichment"] is not None),
        key=lambda row: int(row["name"].split()[1]),
    )
    if len(rows) < 2:
        return None
    figure, axes = new_figure(5.6, 4.2)
    ax = axes[0, 0]
    x = [int(row["name"].split()[1]) for row in rows]
    ax.plot(x, [row["enrichment"] for row in rows], color="#d55e00", marker="o", markersize=4,
            linewidth=1.7, label="tuned")  # fmt: skip
    null = [row["null_enrichment"] for row in rows]
    if all(value is not None for value in null):
        ax.plot(x, null, color=MUTED, linestyle=(0, (4, 3)), linewidth=1.3, label="random update")
    axis_labels(ax, "layer", "share of the top over share of elements")
    legend(ax, loc="best")
    return to_svg(figure, "Share of the most changed elements by layer")


def _share_table(data: Mapping[str, Any]) -> str:
    head = ["most changed", "elements"]
    for label, _, _ in _MEASURES.values():
        head += [label, "random"]
    rows = []
    for row, null in zip(data["shares"], data["null"]["shares"], strict=True):
        cells = [_percent(row["fraction"]), f"{row['count']:,}"]
        for name in _MEASURES:
            cells += [f"<b>{_percent(row[name])}</b>", _percent(null[name])]
        rows.append(cells)
    return f"<section><h2>Shares of the change</h2>{table(head, rows)}</section>"


def _tables(data: Mapping[str, Any]) -> list[str]:
    head = ["", "elements", "unchanged", "sign flipped", "norm of change / source",
            "share of sum r", "share of sum |d|", "share of sum d²",
            f"share of the top {data['enrichment_fraction']} / of elements", "random"]  # fmt: skip
    found = []
    for scope in ("module", "layer", "tensor"):
        rows = [
            [
                escape(row["name"]),
                f"{row['elements']:,}",
                _percent(row["unchanged"]),
                _percent(row["flipped"]),
                f"{row['relative_norm']:.3g}",
                *(
                    _percent(row[name] / data["model"][name] if data["model"][name] else 0.0)
                    for name in _MEASURES
                ),
                _ratio(row["enrichment"]),
                _ratio(row["null_enrichment"]),
            ]
            for row in data[f"{scope}s"]
        ]
        found.append(f"<section><h2>By {scope}</h2>{table(head, rows)}</section>")
    return found


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _made(data: Mapping[str, Any]) -> str:
    rows = [
        ["region", escape(f"include {data['region']['include']!r}, exclude"
                          f" {data['region']['exclude']!r}")],
        ["eps, type of scores", f"{data['eps']:g}, {data['score_dtype']}"],
        ["null model", f"{data['null']['elements']:,} elements, seed {data['null']['seed']}:"
         " Gaussian update of each tensor's root mean square, rounded to the stored type"],
        ["versions", escape(", ".join(f"{k} {v}" for k, v in data["made_by"]["versions"].items()))],
    ]  # fmt: skip
    body = "".join(f"<tr><td>{name}</td><td>{value}</td></tr>" for name, value in rows)
    return f'<section><h2>How it was measured</h2><table class="made">{body}</table></section>'

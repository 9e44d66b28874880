"""The page of the study ``knowledge``."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from forgetscale.evaluation.report.drawing import axis_labels, legend, new_figure, to_svg
from forgetscale.evaluation.report.tables import table
from forgetscale.knowledge.selection_page import FAMILIES, page

_MODELS = ("source", "tuned", "restored", "scaled")
_COLOURS = {"source": "#8a94a0", "tuned": "#1d2733"}
_NOTE = (
    "Accuracy: mean over the mastery groups of untouched facts, asked with a question that neither"
    " training nor tuning held, answered in the style that tuning taught."
)


def render(data: Mapping[str, Any]) -> str:
    """Return the page.

    Args:
        data: Content of ``report.json``.
    """
    parts = [
        _top(data),
        _plots(data),
        _contrast_table(data),
        _cell_table(data),
        _mastery_table(data),
        _size_table(data),
        _made(data),
    ]
    return page(str(data["title"]), "\n".join(parts))


def _top(data: Mapping[str, Any]) -> str:
    verdict, equal = data["verdict"], data["equal_distance"]
    gain = data["contrasts"]["all runs"]["tuned"]
    seeds = len(data["seeds"])
    return (
        f'<header><p class="kind">{data["runs"]} tuned models, {seeds}'
        f" seed{'s' if seeds > 1 else ''}</p><h1>{escape(data['title'])}</h1>"
        f'<p class="headline">Restoration, its fraction chosen on development facts, changes'
        f" accuracy on untouched facts by {gain['value']:+.3f}"
        f" ({gain['low']:+.3f} to {gain['high']:+.3f}).</p>"
        f'<p class="verdict {verdict["status"]}"><b>Each at its own best fraction.</b>'
        f" {escape(verdict['sentence'])}</p>"
        f'<p class="verdict {equal["status"]}"><b>At equal distance from the source, mean over all'
        f" fractions.</b> {escape(equal['sentence'])}</p></header>"
    )


def _plots(data: Mapping[str, Any]) -> str:
    names = list(data["curves"])
    figure, axes = new_figure(3.8 * len(names), 4.0, 1, len(names))
    for ax, name in zip(axes[0], names, strict=True):
        for family, rows in data["curves"][name].items():
            colour, mark = FAMILIES[family]
            ax.plot([row["fraction"] for row in rows], [row["test"] for row in rows], color=colour,
                    marker=mark, linewidth=1.6, markersize=4.5, label=family)  # fmt: skip
        ax.set_title(_setting(name), fontsize=10, loc="left")
        axis_labels(ax, "fraction put back", "accuracy on untouched facts")
    legend(axes[0][0], loc="best")
    first = to_svg(figure, "Accuracy on untouched facts by fraction and kind of edit")
    figure, axes = new_figure(3.8 * len(names), 3.4, 1, len(names))
    for ax, name in zip(axes[0], names, strict=True):
        for model in _MODELS:
            rows = data["by_mastery"][name][model]
            colour = _COLOURS.get(model) or FAMILIES[model][0]
            ax.plot([int(group) for group in rows], list(rows.values()), color=colour, marker="o",
                    linewidth=1.6, markersize=4.5, label=model)  # fmt: skip
        ax.set_title(_setting(name), fontsize=10, loc="left")
        ax.set_xticks(range(5))
        axis_labels(ax, "mastery group of the fact asked", "accuracy")
    legend(axes[0][0], loc="best")
    second = to_svg(figure, "Accuracy on untouched facts by mastery group")
    return (
        '<section class="plots"><figure class="full"><figcaption><b>What is put back, and what is'
        " answered.</b> Means over groups tuned on and seeds; scaled: the whole change, as long as"
        f" what restoration leaves.</figcaption>{first}</figure>"
        '<figure class="full"><figcaption><b>Untouched facts by how well the source knew them.</b>'
        " Source: in its own style; others in the taught style; restored and scaled: as chosen on"
        f" development facts.</figcaption>{second}</figure></section>"
    )


def _setting(name: str) -> str:
    return {
        "240/epochs": "240 conversations, one epoch",
        "240/steps": "240 conversations, steps of 1,920",
        "1920": "1,920 conversations, one epoch",
    }.get(name, name)


def _difference(found: Mapping[str, Any]) -> str:
    text = f"<b>{found['value']:+.4f}</b><small>{found['low']:+.4f} to {found['high']:+.4f}</small>"
    seeds = found["seeds"]
    if seeds["low"] is not None:
        text += f"<small>seeds: {seeds['low']:+.4f} to {seeds['high']:+.4f}</small>"
    return text


def _contrast_table(data: Mapping[str, Any]) -> str:
    groups = dict(data["contrasts"])
    groups["all runs, either style"] = data["contrasts_either"]
    groups["all runs, other relations"] = data["contrasts_other"]
    first = data["contrasts"]["all runs"]
    rows = [["tuned", *(_difference(found["tuned"]) for found in groups.values())]]
    for key, words in (("own_best", "own best"), ("equal_fraction", "equal fraction")):
        for family in first[key]:
            cells = [_difference(found[key][family]) for found in groups.values()]
            rows.append([f"{escape(family)}, {words}", *cells])
    head = ["restored minus", *(escape(_setting(name)) for name in groups)]
    return (
        f"<section><h2>What restoration gains</h2>{table(head, rows)}"
        '<p class="note">Small: 95 % bootstrap over questions within seeds, and Student\'s over'
        " seeds. Own best: both chosen on development facts. Equal fraction: mean over all"
        f" fractions, nothing chosen. {_NOTE}</p></section>"
    )


def _cell_table(data: Mapping[str, Any]) -> str:
    head = ["tuned on", "facts", "source*", "tuned", "restored", "fractions", "scaled",
            "tuned, either style", "restored, either", "tuned, other relations",
            "restored, other", "trained: tuned", "restored", "scaled"]  # fmt: skip
    rows = []
    for cell in data["cells"]:
        found, trained = cell["accuracy"], cell["trained"]
        rows.append(
            [
                f"group {cell['group']}: {escape(_setting(cell['setting']))}",
                ", ".join(map(str, cell["facts"])),
                f"{found['source']['either']:.3f}",
                f"{found['tuned']['test']:.3f}",
                f"<b>{found['restored']['test']:.3f}</b>",
                ", ".join(f"{value:g}" for value in cell["fractions"]),
                f"{found['scaled']['test']:.3f}",
                f"{found['tuned']['either']:.3f}",
                f"{found['restored']['either']:.3f}",
                f"{found['tuned']['other']:.3f}",
                f"{found['restored']['other']:.3f}",
                f"{trained['tuned']:.3f}",
                f"{trained['restored']:.3f}",
                f"{trained['scaled']:.3f}",
            ]
        )
    return (
        f"<section><h2>By group tuned on</h2>{table(head, rows)}"
        '<p class="note">Means over seeds. * in its own style, which it was trained on. Facts: of'
        " the group, per seed; conversations ask each with up to four questions and repeat"
        " beyond that.</p></section>"
    )


def _mastery_table(data: Mapping[str, Any]) -> str:
    rows = []
    for name, found in data["by_mastery"].items():
        for model in _MODELS:
            values = found[model]
            rows.append(
                [
                    escape(_setting(name)),
                    model,
                    *(f"{values[str(g)]:.3f}" if str(g) in values else "–" for g in range(5)),
                ]
            )
    head = ["tuned on", "model", *(f"group {group}" for group in range(5))]
    return f"<section><h2>Untouched facts by mastery</h2>{table(head, rows, left=2)}</section>"


def _size_table(data: Mapping[str, Any]) -> str:
    rows = []
    for size in data["sizes"]:
        seed = str(size["seed"])
        rows.append([seed, "all", *map(str, size["all"])])
        rows.append([seed, "to tune on", *map(str, size["train"])])
        for number, counts in size["by_exposures"].items():
            rows.append([seed, f"met {number} times", *map(str, counts)])
    head = ["seed", "facts", *(f"group {group}" for group in range(5))]
    return (
        f"<section><h2>What the source models know</h2>{table(head, rows, left=2)}"
        '<p class="note">How often a fact is met was fixed before any training.</p></section>'
    )


def _made(data: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in data["made_by"]["versions"].items())
    return f'<section><h2>Made by</h2><p class="note">{escape(versions)}</p></section>'

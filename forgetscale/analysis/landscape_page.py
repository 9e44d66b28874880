"""The page of the landscape: self-contained HTML, drawn from the numbers of ``landscape.json``."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

import numpy as np

from forgetscale.analysis.landscape_numbers import envelope
from forgetscale.evaluation.report.drawing import INK, MUTED, axis_labels, new_figure, to_svg
from forgetscale.evaluation.report.style import STYLE
from forgetscale.evaluation.report.tables import table

CONFLICT = "#c2410c"
_COLOURS = {"conflict": CONFLICT, "mastered": "#0072b2", "uncertain": "#7a4fa3", "open": "#5b6775"}
_PAD = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.5}
_MEANING = {
    "conflict": "the model is sure of another token",
    "mastered": "the model is sure, and not of another token",
    "uncertain": "unlikely, and the model is sure of nothing",
    "open": "likely, among others",
}
_PAGE_STYLE = """
p.wide { grid-column: 1 / -1; margin: -8px 0 0; }
.sample { border-top: 1px solid var(--line); padding: 9px 0; display: grid; gap: 2px 18px;
  grid-template-columns: 165px 225px minmax(0, 1fr); align-items: start; }
.sample .who { font-size: 12px; color: var(--muted); overflow-wrap: anywhere; line-height: 1.4; }
.sample .who b { display: block; color: var(--ink); font-size: 13px; }
.strength { display: grid; grid-template-columns: 66px 1fr; gap: 0 8px; font-size: 12px;
  color: var(--muted); align-items: center; line-height: 1.5; }
.strength em { font-style: normal; overflow-wrap: anywhere; }
.strength span { position: relative; white-space: nowrap; display: flex; align-items: center;
  gap: 6px; }
.bar { display: block; height: 9px; border-radius: 2px; background: #c2410c; flex: none; }
.bar.after { background: #8a94a0; }
.words { font-size: 14px; line-height: 1.6; white-space: pre-wrap; overflow-wrap: anywhere;
  color: #8a94a0; }
.words span { color: var(--ink); border-bottom: 2px solid transparent; }
.words span.uncertain { border-color: #7a4fa3; }
.words span.conflict { border-radius: 3px; padding: 1px 2px; font-weight: 600; }
.words i { font-style: normal; font-weight: 400; font-size: 12px; color: #7c2d12; margin: 0 3px; }
td.context { color: var(--muted); max-width: 420px; overflow-wrap: anywhere; }
td.context b { color: #9a3412; }
.legend { font-size: 12.5px; color: var(--muted); }
@media (max-width: 760px) { .sample { grid-template-columns: 1fr; } }
@media print { .words span, .bar { -webkit-print-color-adjust: exact;
  print-color-adjust: exact; } }
"""


def render(data: Mapping[str, Any]) -> str:
    """Return the page.

    Args:
        data: Content of ``landscape.json``.
    """
    title = escape(str(data["title"]))
    parts = [_top(data), _plots(data), _sources(data), _samples(data), _quadrants(data)]
    parts += [_moves(data), _tokens(data), _made(data)]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}{_PAGE_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def _percent(value: float) -> str:
    return f"{value:.1%}" if value >= 0.001 or value == 0 else "&lt; 0.1%"


def _section(title: str, body: str, note: str = "") -> str:
    small = f'<p class="note">{note}</p>' if note else ""
    return f"<section><h2>{title}</h2>{body}{small}</section>"


def _top(data: Mapping[str, Any]) -> str:
    first, last = data["models"][0], data["models"][-1]
    conflict = first["quadrants"]["conflict"]
    after = ""
    if last is not first:
        share = _percent(last["quadrants"]["conflict"]["tokens"])
        after = f" For <b>{escape(last['name'])}</b> it is {share} of the targets."
    return (
        f'<header><p class="kind">Entropy-probability landscape · {data["num_tokens"]:,} targets in'
        f" {data['num_texts']:,} texts, {data['num_rows']:,} of {data['num_rows_in_all']:,}"
        " rows</p>"
        f"<h1>{escape(data['title'])}</h1>"
        f'<p class="headline"><b>{_percent(conflict["tokens"])}</b> of the targets contradict what'
        f" <b>{escape(first['name'])}</b> is sure of. They carry"
        f" <b>{_percent(conflict['gradient'])}</b> of the pull of plain cross-entropy, and"
        f" {_percent(conflict['gated_gradient'])} under the entropy gate.{after}{_worst(data)}"
        "</p></header>"
    )


def _worst(data: Mapping[str, Any]) -> str:
    """Return a sentence on the source with the largest share of conflicts, where it stands out."""
    name = data["models"][0]["name"]
    found = [(item["name"], item["models"][name]) for item in data["sources"]]
    if len(found) < 2 or found[0][1]["conflicts"] == 0:
        return ""
    share = found[0][1]["conflicts"] / sum(numbers["conflicts"] for _, numbers in found)
    return f" <b>{escape(found[0][0])}</b> holds {_percent(share)} of the conflicts."


def _plots(data: Mapping[str, Any]) -> str:
    peak = max(max(map(max, model["histogram"]["counts"])) for model in data["models"])
    top = max(model["histogram"]["entropy_edges"][-1] for model in data["models"])
    figures = "".join(
        f"<figure><figcaption><b>{escape(model['name'])}</b> mean gate {model['mean_gate']:.2f},"
        f" cross-entropy {model['cross_entropy']:.3f} nats</figcaption>"
        f"{_landscape(model, data, peak, top)}</figure>"
        for model in data["models"]
    )
    note = (
        '<p class="note wide">Each cell counts targets, darker is more (logarithmic). No token can'
        " lie below the arc: the target alone already costs that much entropy. The box at the lower"
        " left holds the conflicts.</p>"
    )
    return f'<section class="plots">{figures}{note}</section>'


def _landscape(model: Mapping[str, Any], data: Mapping[str, Any], peak: int, top: float) -> str:
    from matplotlib.collections import PolyCollection
    from matplotlib.colors import LogNorm
    from matplotlib.patches import Rectangle

    figure, axes = new_figure(5.6, 4.3)
    ax = axes[0, 0]
    histogram = model["histogram"]
    x, y = histogram["probability_edges"], histogram["entropy_edges"]
    counts = np.array(histogram["counts"])
    cells = np.argwhere(counts > 0)
    boxes = [
        [(x[i], y[j]), (x[i + 1], y[j]), (x[i + 1], y[j + 1]), (x[i], y[j + 1])] for i, j in cells
    ]
    shown = PolyCollection(boxes, array=counts[cells[:, 0], cells[:, 1]].astype(float),
                           cmap="Blues", norm=LogNorm(0.15, max(2, peak)), edgecolors="face",
                           linewidths=0.2)  # fmt: skip
    ax.add_collection(shown)
    p = np.linspace(0, 1, 200)
    low, high = envelope(p, data["vocab_size"])
    ax.plot(p, low, color=INK, linewidth=0.9)
    ax.plot(p, high, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
    borders = data["borders"]
    ax.add_patch(Rectangle((0, 0), borders["probability"], borders["entropy"], fill=False,
                           edgecolor=CONFLICT, linewidth=2, zorder=4))  # fmt: skip
    share = model["quadrants"]["conflict"]["tokens"]
    ax.annotate(f"conflict {share:.1%}", (borders["probability"], borders["entropy"] / 2),
                xytext=(7, 0), textcoords="offset points", color=CONFLICT, fontsize=10,
                fontweight="bold", va="center",
                bbox=_PAD)  # fmt: skip
    for name, (at_x, at_y) in {"uncertain": (0.02, 0.97), "mastered": (0.92, 0.015)}.items():
        ax.text(at_x, at_y, f"{name} {model['quadrants'][name]['tokens']:.1%}",
                transform=ax.transAxes, color=_COLOURS[name], fontsize=9.5,
                ha="left" if at_x < 0.5 else "right", va="top" if at_y > 0.5 else "bottom",
                bbox=_PAD)  # fmt: skip
    ax.set_xlim(0, 1)
    ax.set_ylim(0, top)
    axis_labels(ax, "probability of the target", "entropy of the prediction, nats")
    return to_svg(figure, f"Landscape under {model['name']}")


def _samples(data: Mapping[str, Any]) -> str:
    first = data["models"][0]["name"]
    if not data["texts"]:
        return _section("Samples that fight the model", "<p>No target is a conflict.</p>")
    most = max(item["models"][first]["conflict_nats"] for item in data["texts"])
    body = "".join(_sample(item, data, most) for item in data["texts"])
    note = (
        "Conflict of a sample: what the entropy gate takes of the loss of its conflicting targets,"
        f" summed, in nats, under <b>{escape(first)}</b>. Grey words are not trained on; on"
        ' <b style="color:#9a3412">orange</b> stands a conflict, after it what the model says'
        " instead; underlined words are uncertain. Point at a word for its numbers."
    )
    return _section("Samples that fight the model, strongest first", body, note)


def _sample(item: Mapping[str, Any], data: Mapping[str, Any], most: float) -> str:
    lines = []
    for number, model in enumerate(data["models"]):
        found = item["models"][model["name"]]
        width = 70 * found["conflict_nats"] / most
        kind = "bar" if number == 0 else "bar after"
        lines.append(
            f"<em>{escape(model['name'])}</em>"
            f'<span><b class="{kind}" style="width:{min(width, 80):.1f}px"></b>'
            f"{found['conflict_nats']:.1f} nats</span>"
        )
    found = item["models"][data["models"][0]["name"]]
    where = f"{escape(item['set'])} row {item['row']}"
    return (
        f'<div class="sample"><div class="who"><b>{escape(item["source"])}</b>'
        f"{where}: {found['conflicts']} of {found['tokens']} targets</div>"
        f'<div class="strength">{"".join(lines)}</div><div class="words">'
        f"{''.join(_word(token) for token in item['shown'])}</div></div>"
    )


def _word(token: Mapping[str, Any]) -> str:
    bare = token["text"].lstrip()
    space, text = escape(token["text"][: len(token["text"]) - len(bare)]), escape(bare)
    if "quadrant" not in token:
        return space + text
    says = escape(token["model_says"].strip() or repr(token["model_says"]))
    numbers = (
        f"p {token['probability']:.4f}, entropy {token['entropy']:.2f}, gate {token['gate']:.2f};"
        f" model says {says} ({token['best_probability']:.2f})"
    )
    kind = token["quadrant"]
    if kind != "conflict":
        return f'{space}<span class="{kind}" title="{numbers}">{text}</span>'
    shade = 0.18 + 0.5 * min(1.0, token["conflict_nats"] / 10)
    look = f"background:rgba(234,88,12,{shade:.2f})"
    return (
        f'{space}<span class="conflict" style="{look}" title="{numbers}">{text}</span>'
        f"<i>({says})</i>"
    )


def _quadrants(data: Mapping[str, Any]) -> str:
    rows = []
    for name in data["quadrants"]:
        for number, model in enumerate(data["models"]):
            found = model["quadrants"][name]
            dot = f'<span class="dot" style="background:{_COLOURS[name]}"></span>'
            rows.append([
                f"{dot}{name}<small>{_MEANING[name]}</small>" if number == 0 else "",
                escape(model["name"]),
                *[_percent(found[mass]) for mass in
                  ("tokens", "loss", "gradient", "gated_loss", "gated_gradient")],
                "–" if found["mean_gate"] is None else f"{found['mean_gate']:.2f}",
            ])  # fmt: skip
    head = ["quadrant", "model", "targets", "loss", "gradient", "loss, gated", "gradient, gated",
            "mean gate"]  # fmt: skip
    borders = data["borders"]
    pilot = data["models"][0]["pilot_mask"]
    note = (
        f"Sure: entropy up to {borders['entropy']:g} nats. Unlikely: probability up to"
        f" {borders['probability']:g}. Gate: entropy of the 20 largest logits (or of the recipe's"
        " top_k) over its largest value. The lowest 15% in entropy"
        f" (≤ {pilot['entropy']:.2g} nats) and in probability (≤ {pilot['probability']:.2g}), the"
        f" mask of the paper's pilot, have {_percent(pilot['share'])} of the targets in common."
    )
    return _section("Where targets lie, and what they weigh", table(head, rows, left=2), note)


def _sources(data: Mapping[str, Any]) -> str:
    if len(data["sources"]) < 2:
        return ""
    names = [model["name"] for model in data["models"]]
    rows = []
    for item in data["sources"][:40]:
        found = [item["models"][name] for name in names]
        rows.append([
            escape(item["name"]), f"{found[0]['tokens']:,}",
            *[f"<b>{_percent(one['conflicts'] / one['tokens'])}</b>" for one in found],
            *[f"{one['cross_entropy']:.2f}" for one in found],
            f"{found[0]['mean_gate']:.2f}",
        ])  # fmt: skip
    head = ["source", "targets", *[f"conflicts, {escape(name)}" for name in names],
            *[f"loss, {escape(name)}" for name in names], "mean gate"]  # fmt: skip
    return _section("Sources, by their share of conflicts", table(head, rows))


def _moves(data: Mapping[str, Any]) -> str:
    if data["transitions"] is None:
        return ""
    names = data["quadrants"]
    rows = [
        [name, *[_percent(count / max(1, sum(counts))) for count in counts], f"{sum(counts):,}"]
        for name, counts in zip(names, data["transitions"], strict=True)
    ]
    first, last = (escape(data["models"][at]["name"]) for at in (0, -1))
    head = [f"{first} ↓ {last} →", *names, "targets"]
    return _section("Where targets went", table(head, rows))


def _tokens(data: Mapping[str, Any]) -> str:
    if not data["tokens"]:
        return ""
    rows = []
    for item in data["tokens"]:
        found = list(item["models"].values())
        rows.append([
            f"{escape(item['source'])}<small>{escape(item['set'])}, row {item['row']},"
            f" token {item['place']}</small>",
            f'…{escape(item["before"][-160:])} <b>{escape(item["target"])}</b>',
            f"{escape(item['model_says'])}",
            f"{found[0]['best_probability']:.2f}",
            *[f"{one['probability']:.2g}" for one in found],
            f"{found[0]['entropy']:.2f}", f"{found[0]['gate']:.2f}",
        ])  # fmt: skip
    names = [escape(model["name"]) for model in data["models"]]
    head = ["where", "text and target", "model says", "p of it",
            *[f"p of the target, {name}" for name in names], "entropy", "gate"]  # fmt: skip
    body = table(head, rows, left=3).replace("<td>…", '<td class="context">…')
    return _section("Strongest conflicts, one for each sample", body)


def _made(data: Mapping[str, Any]) -> str:
    rows = [
        ["model", f"{escape(item['name'])}: {escape(item['path'])} ({item['model_hash'][:16]})"]
        for item in data["models"]
    ]
    rows += [["data", f"{escape(name)} ({value[:16]})"] for name, value in data["data"].items()]
    made = data["made_by"]
    rows.append(["made by", escape(" ".join(made["command"]))])
    rows.append(["time", escape(made["time"])])
    body = table(["what", "from"], rows, left=2, kind="made")
    return _section("How this was made", body)

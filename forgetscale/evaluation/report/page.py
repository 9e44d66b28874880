"""The page: one self-contained HTML file, drawn from the numbers of ``report.json``."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from forgetscale.evaluation.report.bars import abilities_plot, matched_plot
from forgetscale.evaluation.report.curves import retention_key, retention_plot, steps_plot
from forgetscale.evaluation.report.drawing import method_styles
from forgetscale.evaluation.report.mixing import mixing_plot
from forgetscale.evaluation.report.runs import RECALL
from forgetscale.evaluation.report.safety import safety_tables
from forgetscale.evaluation.report.style import STYLE
from forgetscale.evaluation.report.tables import table
from forgetscale.evaluation.report.text_style import style_plot
from forgetscale.evaluation.report.words import (
    ability_label,
    headline,
    interval,
    is_rate,
    number,
    signed_percent,
)

_STATUS = {"held": "good", "not held": "bad", "not tested": "open"}


def render(data: Mapping[str, Any]) -> str:
    """Return the page.

    Args:
        data: Content of ``report.json``.
    """
    title = escape(str(data["title"]))
    sections = [
        _top(data),
        _key_table(data),
        _plots(data),
        _matched_table(data),
        _abilities_table(data),
        *_safety(data),
        _runs_table(data),
        _how_measured(data),
        _provenance(data),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main>\n</body>\n</html>\n"
    )


def _top(data: Mapping[str, Any]) -> str:
    claim = data["claim"]
    seeds = {run["seed"] for run in data["runs"]}
    count = f"{len(data['runs'])} run{'s' if len(data['runs']) > 1 else ''}"
    methods = f"{len(data['summary'])} method{'s' if len(data['summary']) > 1 else ''}"
    numbers = f"{count}, {methods}, {len(seeds)} seed{'s' if len(seeds) > 1 else ''}"
    verdict = ""
    if len(data["summary"]) > 1 and _measured(data, data["matched_ability"]):
        verdict = (
            f'<p class="verdict {_STATUS[claim["status"]]}"><b>Claim {escape(claim["status"])}.</b>'
            f" {escape(_without_status(claim['sentence'], claim['status']))}"
            f'<span class="claim">{escape(claim["claim"])}</span></p>'
        )
    return (
        f'<header><p class="kind">Retention report · {numbers}</p>'
        f"<h1>{escape(str(data['title']))}</h1>"
        f'<p class="headline">{"<br>".join(map(escape, headline(data)))}</p>{verdict}</header>'
    )


def _measured(data: Mapping[str, Any], name: str) -> bool:
    return any(name in entry["abilities"] for entry in data["summary"])


def _without_status(sentence: str, status: str) -> str:
    """Return the claim's sentence without the status it opens with, which the box shows."""
    rest = sentence[len(status) :].lstrip(": ") if sentence.lower().startswith(status) else sentence
    return rest[:1].upper() + rest[1:]


def _method_cell(method: str, styles: Mapping[str, tuple[str, str]]) -> str:
    colour = styles[method][0]
    return f'<span class="dot" style="background:{colour}"></span>{escape(method)}'


def _change(ability: Mapping[str, Any] | None) -> str:
    if ability is None:
        return "–"
    spread = interval(ability["low"], ability["high"])
    small = f"<small>{spread}</small>" if spread else ""
    return f"{number(ability['before'])} → <b>{number(ability['after'])}</b>{small}"


def _spread(mean: Mapping[str, Any] | None, *, percent: bool = False) -> str:
    """Return a mean with its interval below it."""
    if mean is None:
        return "–"
    write = signed_percent if percent else number
    if mean["low"] is None:
        return f"<b>{write(mean['mean'])}</b>"
    return (
        f"<b>{write(mean['mean'])}</b><small>{write(mean['low'])} to {write(mean['high'])}</small>"
    )


def _key_table(data: Mapping[str, Any]) -> str:
    summary = data["summary"]
    styles = method_styles([entry["method"] for entry in summary])
    head = ["method", "seeds"]
    ability = data["matched_ability"]
    shown = [name for name in dict.fromkeys((ability, RECALL)) if _measured(data, name)]
    if not shown:
        shown = [name for name in _BITS if _measured(data, name)]
    if not shown and _measured(data, "perplexity/source"):
        shown = ["perplexity/source"]
    if any(entry["target"] for entry in summary) and shown != list(_BITS):
        head.append("target perplexity")
    head += [escape(ability_label(name)) for name in shown]
    middle = len(data["matched_levels"]) // 2
    is_matched = bool(data["matched_levels"]) and len(summary) > 1
    if is_matched:
        level = data["matched_levels"][middle]
        where = f"at perplexity {number(level['target_perplexity'])}"
        head.append(escape(f"{ability_label(ability)} {where}"))
    averaged = any(entry["relative_degradation"] for entry in summary)
    if averaged:
        head.append("source tasks, relative change")
    seconds = {entry["method"]: entry["step_seconds"] for entry in summary}
    if any(seconds.values()):
        head.append("step time")
    rows = []
    for entry in summary:
        row = [_method_cell(entry["method"], styles), str(len(entry["seeds"]))]
        if "target perplexity" in head:
            row.append(_change(entry["target"]))
        row += [_change(entry["abilities"].get(name)) for name in shown]
        if is_matched:
            row.append(_spread(entry["matched_points"][middle]["kept"]))
        if averaged:
            row.append(_spread(entry["relative_degradation"], percent=True))
        if any(seconds.values()):
            control = data["control"]
            row.append(_seconds(entry["step_seconds"], seconds, entry["method"], control))
        rows.append(row)
    note = "Before → after adaptation; small: 95% interval."
    if is_matched:
        note += " Runs end at different target perplexity: compare the column at equal perplexity."
    return f'<section class="key">{table(head, rows)}<p class="note">{note}</p></section>'


_BITS = ("bits_per_byte/target", "bits_per_byte/source")


def _seconds(
    seconds: float | None, all_seconds: Mapping[str, float | None], method: str, control: str
) -> str:
    if seconds is None:
        return "–"
    text = f"{seconds:.3g} s"
    if (other := all_seconds.get(control)) and method != control:
        text += f"<small>{seconds / other:.2f} × {escape(control)}</small>"
    return text


def _plots(data: Mapping[str, Any]) -> str:
    key = retention_key(data)
    kept = ability_label(key) if key else "source ability"
    matched = matched_plot(data)
    figures = [
        (
            retention_plot(data, wide=matched is None),
            f"What is kept against what is gained: {kept} while target perplexity falls. Higher"
            " and further right is better."
            if key and is_rate(key)
            else f"What is kept against what is gained: {kept} while target perplexity falls. Lower"
            " and further right is better.",
            "Bands: range over seeds. Dotted: matched points."
            if matched
            else "Bands, if any: range over seeds.",
            "half" if matched else "full",
        ),
        (
            matched,
            f"Lost at equal target perplexity: {ability_label(data['matched_ability'])}.",
            "Lines: 95% t interval over seeds.",
            "half",
        ),
        (
            mixing_plot(data),
            f"{ability_label(data['matched_ability'])} kept, by how much other text was mixed in.",
            "All at equal target perplexity. Small dots: seeds. Dashed: methods without a mixture.",
            "full",
        ),
        (
            style_plot(data),
            "How foreign the data are to the source model, and how far training moved it.",
            "First rows of each set under the source model; small dots: seeds.",
            "full",
        ),
        (
            abilities_plot(data),
            "Every ability before and after adaptation.",
            "Lines: 95% interval (bootstrap for one run, t over several seeds).",
            "full",
        ),
        (steps_plot(data), "Over the steps of training.", "One line per run.", "full"),
    ]
    drawn = [
        f'<figure class="{width}"><figcaption><b>{escape(text)}</b> {escape(note)}</figcaption>'
        f"{svg}</figure>"
        for svg, text, note, width in figures
        if svg
    ]
    return f'<section class="plots">{"".join(drawn)}</section>' if drawn else ""


def _matched_table(data: Mapping[str, Any]) -> str:
    ability, control = data["matched_ability"], data["control"]
    if len(data["summary"]) < 2 or not _measured(data, ability):
        return ""
    if not data["matched_levels"]:
        why = escape(data["matched_missing"])
        return f"<section><h2>Matched comparison</h2><p>Not possible: {why}.</p></section>"
    styles = method_styles([entry["method"] for entry in data["summary"]])
    head = ["method"]
    for level in data["matched_levels"]:
        where = f"{level['name']}, {number(level['target_perplexity'])}"
        head += [f"kept ({where})", "lost", f"lost − {escape(control)}"]
    rows = []
    for entry in data["summary"]:
        row = [_method_cell(entry["method"], styles)]
        for point in entry["matched_points"]:
            row += [
                _spread(point["kept"]),
                _spread(point["lost"]),
                _spread(point["lost_minus_control"]),
            ]
        rows.append(row)
    idle = data["matched_idle"]
    left_out = f" Left out here: <b>{escape(', '.join(idle))}</b>." if idle else ""
    return (
        f"<section><h2>Matched comparison: {escape(ability_label(ability))}</h2>"
        f"<p>{escape(data['matched_rule'])}{left_out} Means over seeds with 95% t intervals; the"
        f" last column of each group is paired by seed.</p>{table(head, rows)}"
        f"{_other_abilities(data, styles)}{_claim_table(data)}</section>"
    )


def _other_abilities(data: Mapping[str, Any], styles: Mapping[str, tuple[str, str]]) -> str:
    """Return a table of what else was measured during training, at the matched points."""
    others = data["matched_others"]
    levels = data["matched_levels"]
    if not others:
        return ""
    head = ["method"] + [
        escape(f"{ability_label(name)} ({level['name']})") for name in others for level in levels
    ]
    rows = [
        [_method_cell(entry["method"], styles)]
        + [_spread(mean) for means in others.values() for mean in means[entry["method"]]]
        for entry in data["summary"]
    ]
    return f"<h3>Other abilities at the same points</h3>{table(head, rows)}"


def _claim_table(data: Mapping[str, Any]) -> str:
    claim = data["claim"]
    if not claim["points"]:
        return ""
    names = [claim["subject"], claim["control"], *claim["others"]]
    head = ["matched point", *(escape(f"{name}, lost") for name in names)]
    head += [f"below {escape(claim['control'])} by", "as claimed"]
    head += [f"below {escape(name)}" for name in claim["others"]]
    rows = [
        [
            f"{escape(point['name'])}, perplexity {number(point['target_perplexity'])}",
            *(number(point["lost"][name]) for name in names),
            "–" if point["reduction"] is None else f"{point['reduction']:.0%}",
            _yes(point["below_control"]),
            *(_yes(point["below_others"][name]) for name in claim["others"]),
        ]
        for point in claim["points"]
    ]
    return f"<h3>Claim, point by point: {escape(claim['status'])}</h3>{table(head, rows)}"


def _yes(value: bool) -> str:
    return '<span class="yes">✓ yes</span>' if value else '<span class="no">✗ no</span>'


def _abilities_table(data: Mapping[str, Any]) -> str:
    summary = data["summary"]
    names = list(dict.fromkeys(name for entry in summary for name in entry["abilities"]))
    if not names:
        return ""
    styles = method_styles([entry["method"] for entry in summary])
    changes = _mean_changes(data)
    rows = []
    for name in names:
        label = escape(ability_label(name))
        for entry in summary:
            ability = entry["abilities"].get(name)
            if ability is None:
                continue
            direction = "" if ability["higher_is_better"] or not label else " ↓"
            rows.append(
                [
                    label + direction,
                    _method_cell(entry["method"], styles),
                    number(ability["before"]),
                    f"<b>{number(ability['after'])}</b>",
                    interval(ability["low"], ability["high"]) or "–",
                    signed_percent(changes.get((entry["method"], name))),
                    f"{ability['n']:,}",
                ]
            )
            label = ""
    head = ["ability", "method", "before", "after", "95% interval", "relative change", "n"]
    return (
        "<section><h2>All abilities</h2><p>↓ marks abilities where less is better; a negative"
        " relative change, given for source abilities, is always a loss.</p>"
        f"{table(head, rows, left=2)}</section>"
    )


def _mean_changes(data: Mapping[str, Any]) -> dict[tuple[str, str], float]:
    found: dict[tuple[str, str], list[float]] = {}
    for run in data["runs"]:
        for name, change in run["relative_degradation"]["abilities"].items():
            if run["abilities"].get(name, {}).get("side") != "source":
                continue
            found.setdefault((run["method"], name), []).append(change)
    return {key: sum(values) / len(values) for key, values in found.items()}


def _safety(data: Mapping[str, Any]) -> list[str]:
    return [
        f"<section><h2>{title}</h2><p>{words}</p>{table(head, rows)}</section>"
        for title, words, head, rows in safety_tables(data)
    ]


def _runs_table(data: Mapping[str, Any]) -> str:
    styles = method_styles([run["method"] for run in data["runs"]])
    ability = data["matched_ability"]
    kept = ability_label(ability)
    head = ["run", "method", "seed", "target perplexity", escape(kept), "at matched points"]
    head += ["source tasks", "step time"]
    rows = []
    for run in data["runs"]:
        points = " · ".join(number(point["kept"]) for point in run["matched_points"]) or "–"
        settings = ", ".join(
            f"{key.removesuffix('.path').rpartition('.')[2]} {value}"
            for key, value in run["settings"].items()
        )
        details = "".join(f"<small>{escape(line)}</small>" for line in (settings, *run["notes"]))
        rows.append(
            [
                escape(run["folder"]) + details,
                _method_cell(run["method"], styles),
                str(run["seed"]),
                _change(run["target"]),
                _change(run["abilities"].get(ability)),
                points,
                signed_percent(run["relative_degradation"]["average"]),
                "–" if run["step_seconds"] is None else f"{run['step_seconds']:.3g} s",
            ]
        )
    return f"<section><h2>Runs</h2>{table(head, rows, left=2)}</section>"


def _how_measured(data: Mapping[str, Any]) -> str:
    points = [
        "<b>Perplexity</b>: e to the mean negative log-likelihood of held-out tokens.",
        "<b>Bits per byte</b>: the same in bits per UTF-8 byte of text; comparable between"
        " tokenizers.",
        "<b>Fact recall</b>: share of closed-book questions whose greedy answer equals an accepted"
        " one, by teacher forcing on the answer and the end-of-turn token.",
        "<b>Compliance</b>: share of generated answers that pass every check of a program."
        " <b>Refusals</b> are recognised by their opening words (a heuristic).",
        "<b>Answers mixed</b>: share of answers to source-language prompts with at least one word"
        " that belongs to the target language only.",
        "<b>Intervals</b>: 95%; bootstrap over questions or rows for one run, Student's t over"
        " seeds for several. A bootstrap interval has no width where all answers were alike.",
        "<b>Relative change</b>: (adapted − source) / source per task, as in arXiv 2512.04844,"
        " averaged over source tasks: chat tasks in the source language; target tasks,"
        " code-mixing and perplexities are shown but not averaged. Where less is better: for"
        " rates, of the share of good answers; for perplexity and bits per byte, with the sign"
        " turned. So a negative number is always a loss.",
        "<b>Step time</b>: median over the run without its first steps, on the machine of the run.",
    ]
    items = "".join(f"<li>{point}</li>" for point in points)
    return f"<section><h2>How it was measured</h2><ul>{items}</ul></section>"


def _provenance(data: Mapping[str, Any]) -> str:
    made_by = data["provenance"]
    seen: dict[str, list[str]] = {}
    for run in data["runs"]:
        text = ", ".join(f"{key} {value}" for key, value in run["versions"].items())
        if text:
            seen.setdefault(text, []).append(run["folder"])
    rows = [
        [escape(", ".join(folders) if len(seen) > 1 else "all runs"), escape(text)]
        for text, folders in seen.items()
    ]
    rows.append(
        [
            "this report",
            escape(
                f"{' '.join(map(str, made_by.get('command', [])))}; commit"
                f" {made_by.get('commit')}; {made_by.get('time')}"
            ),
        ]
    )
    return (
        "<section><h2>Provenance</h2>"
        f"{table(['what', 'made by'], rows, left=2, kind='made')}</section>"
    )

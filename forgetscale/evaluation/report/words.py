"""How numbers and names are written on the page, and the sentences at its top."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from forgetscale.evaluation.report.runs import RECALL, TARGET

_NAMES = {
    RECALL: "fact recall",
    "compliance": "instruction compliance",
    "refusal": "unsafe requests refused",
    "over_refusal": "harmless requests refused",
    "code_mixing": "code-mixed answers",
    "target_recall": "target fact recall",
    "recall_planted": "recall of contradicted facts",
    "refused": "unsafe requests refused (forced answer)",
}
_UNBOUNDED = ("perplexity", "bits_per_byte")


def ability_label(name: str) -> str:
    """Return an ability's name for people."""
    if name in _NAMES:
        return _NAMES[name]
    kind, slash, rest = name.partition("/")
    if slash and kind in _UNBOUNDED:
        return f"{rest} {kind.replace('_', ' ')}"
    return name.replace("_", " ")


def is_rate(name: str) -> bool:
    """Return whether an ability lies in [0, 1] and more of it is better."""
    return name.partition("/")[0] not in _UNBOUNDED


def number(value: float | None) -> str:
    """Write a number with two decimals, above 10 with three digits; a dash where there is none."""
    if value is None:
        return "–"
    if abs(value) >= 1000:
        text = f"{value:,.0f}"
    else:
        text = f"{value:.3g}" if abs(value) >= 10 else f"{value:.2f}"
    return text.replace("-", "−")


def signed_percent(value: float | None) -> str:
    """Write a share as a percentage with its sign; a dash where there is none."""
    return "–" if value is None else f"{value:+.1%}".replace("-", "−")


def interval(low: float | None, high: float | None) -> str:
    """Write an interval; empty where there is none."""
    return "" if low is None or high is None else f"{number(low)} to {number(high)}"


def headline(data: Mapping[str, Any]) -> list[str]:
    """Return the sentence a hurried reader takes away, or one for each of a few methods."""
    summary = data["summary"]
    if len(summary) > 1 and data["matched_levels"]:
        return [_matched_sentence(data)]
    return [_method_sentence(entry) for entry in summary[:4]]


def _matched_sentence(data: Mapping[str, Any]) -> str:
    middle, ability = len(data["matched_levels"]) // 2, data["matched_ability"]
    level = data["matched_levels"][middle]
    kept = sorted(
        (
            (point["kept"]["mean"], entry["method"])
            for entry in data["summary"]
            if (point := entry["matched_points"][middle])["kept"] is not None
        ),
        reverse=True,
    )
    before = [
        entry["abilities"][ability]["before"]
        for entry in data["summary"]
        if ability in entry["abilities"]
    ]
    start = f" of {sum(before) / len(before):.0%} before" if before else ""
    parts = [f"{recall:.0%} with {method}" for recall, method in kept]
    listed = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
    return (
        f"At equal target perplexity ({number(level['target_perplexity'])}),"
        f" {ability_label(ability)}{start} is"
        f" {listed}."
    )


def _method_sentence(entry: Mapping[str, Any]) -> str:
    """Return what one method gained and lost, in its own words where recall is not measured."""
    abilities = entry["abilities"]
    parts = []
    gain = abilities.get("bits_per_byte/target") if RECALL not in abilities else None
    gained = gain or entry["target"]
    if gained is not None:
        what = "target bits per byte" if gain else ability_label(TARGET)
        parts.append(f"{what} {number(gained['before'])} → {number(gained['after'])}")
    for name in (RECALL, "bits_per_byte/source", "perplexity/source"):
        if name in abilities:
            kept = abilities[name]
            parts.append(
                f"{ability_label(name)} {number(kept['before'])} → {number(kept['after'])}"
            )
            break
    if not parts:
        parts = [
            f"{ability_label(name)} {number(kept['before'])} → {number(kept['after'])}"
            for name, kept in list(abilities.items())[:3]
        ]
    return f"{entry['method']}: {', '.join(parts) or 'nothing measured before and after'}."

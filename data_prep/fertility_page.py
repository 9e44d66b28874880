"""The page and the table of ``fertility``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data_prep.page import figure, page, section, table
from forgetscale.evaluation.report.drawing import INK, new_figure, require_matplotlib, to_svg

_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
_PANELS = (
    ("tokens_per_word", "tokens a word", "{:.2f}"),
    ("tokens_per_byte", "tokens a byte of UTF-8", "{:.2f}"),
    ("byte_share", "tokens below a character", "{:.0%}"),
)
_HEAD = (
    ("language", "language"),
    ("tokenizer", "tokenizer"),
    ("documents", "documents"),
    ("words", "words"),
    ("text_bytes", "bytes"),
    ("tokens", "tokens"),
    ("tokens_per_word", "tokens / word"),
    ("tokens_per_byte", "tokens / byte"),
    ("byte_share", "below a character"),
    ("unknown_share", "unknown"),
)


def _cell(key: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    if key.endswith("_share"):
        return f"{value:.1%}"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"


def fertility_table(found: Mapping[str, Any]) -> str:
    """Return the numbers as aligned lines."""
    rows = [[label for _, label in _HEAD]]
    rows += [[_cell(key, row[key]) for key, _ in _HEAD] for row in found["fertility"]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place < 2 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _plot(found: Mapping[str, Any]) -> str:
    require_matplotlib()
    names = [item["name"] for item in found["tokenizers"]]
    first = {row["language"]: row for row in reversed(found["fertility"])}
    languages = sorted(first, key=lambda name: first[name]["tokens_per_byte"])
    values = {(row["language"], row["tokenizer"]): row for row in found["fertility"]}
    height = 1.1 + len(languages) * (0.16 + 0.2 * len(names))
    fig, axes = new_figure(11, height, 1, len(_PANELS))
    width = 0.82 / len(names)
    for ax, (key, label, form) in zip(axes[0], _PANELS, strict=True):
        largest = max((row[key] for row in values.values()), default=1.0) or 1.0
        for index, name in enumerate(names):
            colour = _COLOURS[index % len(_COLOURS)]
            for place, language in enumerate(languages):
                value = values[language, name][key]
                y = place + (index - (len(names) - 1) / 2) * width
                ax.barh(y, value, width * 0.9, color=colour,
                        label=name if place == 0 else None)  # fmt: skip
                ax.annotate(form.format(value), (value, y), xytext=(4, 0), fontsize=8,
                            textcoords="offset points", va="center", color=INK)  # fmt: skip
        ax.set_yticks(range(len(languages)), languages if ax is axes[0, 0] else [], color=INK)
        ax.invert_yaxis()
        ax.grid(False, axis="y")
        ax.set_xlim(0, largest * 1.16)
        ax.locator_params(axis="x", nbins=5)
        if key == "byte_share":
            ax.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        ax.set_title(label, fontsize=10, color=INK, loc="left")
    if len(names) > 1:
        handles, labels = axes[0, 0].get_legend_handles_labels()
        fig.legend(handles, labels, frameon=False, fontsize=9, labelcolor=INK,
                   loc="outside upper left", ncols=len(names))  # fmt: skip
    return to_svg(fig, "Tokens per word, tokens per byte and share of byte tokens, by language")


def fertility_page(found: Mapping[str, Any]) -> str:
    """Return the page.

    Args:
        found: Result of ``compare``.
    """
    rows = found["fertility"]
    worst = max(rows, key=lambda row: row["tokens_per_byte"])
    best = min(rows, key=lambda row: row["tokens_per_byte"])
    ratio = worst["tokens_per_byte"] / best["tokens_per_byte"]
    headline = (
        f"{worst['language']} costs {ratio:.1f} times as many tokens a byte with"
        f" {worst['tokenizer']} as {best['language']} with {best['tokenizer']}."
        if len(rows) > 1
        else f"{worst['language']}: {worst['tokens_per_word']:.2f} tokens a word."
    )
    head = [label for _, label in _HEAD]
    body = [[_cell(key, row[key]) for key, _ in _HEAD] for row in rows]
    tokenizers = [
        [item["name"], item["path"], f"{item['vocabulary']:,}", item["sha256"][:16]]
        for item in found["tokenizers"]
    ]
    return page(
        "Fertility report",
        "Tokens a language costs",
        headline,
        [
            figure(_plot(found), "By language,", "fewer is cheaper; sorted by tokens a byte."),
            section(
                "Numbers",
                table(head, body, left=2),
                "A word is a run of letters, marks and digits; in scripts that do not part words"
                " read tokens a byte. A token below a character is a byte of byte fallback, or a"
                " piece of a byte-level vocabulary that is no whole character.",
            ),
            section(
                "Tokenizers",
                table(["name", "folder", "vocabulary", "SHA-256"], tokenizers, left=2),
            ),
        ],
    )

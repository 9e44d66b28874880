"""Self-contained pages of data preparation, in the look of the retention report."""

from __future__ import annotations

import os
from collections.abc import Sequence
from html import escape
from pathlib import Path

from forgetscale.evaluation.report.style import STYLE
from forgetscale.evaluation.report.tables import table as html_table


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Return a table of text cells; the first ``left`` columns are words, the others numbers."""
    words = [[escape(cell) for cell in row] for row in rows]
    return html_table([escape(cell) for cell in head], words, left=left)


def section(title: str, body: str, note: str = "") -> str:
    """Return a box with a title; ``body`` is HTML, ``note`` is text below it."""
    small = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{body}{small}</section>"


def figure(svg: str, title: str, caption: str) -> str:
    """Return a plot over the whole width."""
    words = f"<figcaption><b>{escape(title)}</b> {escape(caption)}</figcaption>"
    return f'<section class="plots"><figure class="full">{words}{svg}</figure></section>'


def page(kind: str, title: str, headline: str, parts: Sequence[str]) -> str:
    """Return the whole page; ``parts`` are HTML, the rest is text."""
    top = (
        f'<header><p class="kind">{escape(kind)}</p><h1>{escape(title)}</h1>'
        f'<p class="headline">{escape(headline)}</p></header>'
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join([top, *parts])
        + "\n</main>\n</body>\n</html>\n"
    )


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)

"""Tables of every page."""

from __future__ import annotations

from collections.abc import Sequence


def table(
    head: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1, kind: str = ""
) -> str:
    """Return a table that scrolls where it is too wide.

    Args:
        head: HTML of the cells of the first row.
        rows: HTML of the cells.
        left: Columns from the left that are text; the others are numbers.
        kind: Class of the table.
    """

    def cells(row: Sequence[str], tag: str) -> str:
        return "".join(
            f"<{tag}{'' if index < left else ' class=num'}>{cell}</{tag}>"
            for index, cell in enumerate(row)
        )

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{cells(head, "th")}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )

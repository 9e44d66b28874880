"""Run folders in, ``report.json`` and ``report.html`` out."""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from pathlib import Path

from forgetscale.artifact import fsync_path, provenance, write_json
from forgetscale.errors import DataError
from forgetscale.evaluation.report.drawing import require_matplotlib
from forgetscale.evaluation.report.page import render
from forgetscale.evaluation.report.runs import read_runs
from forgetscale.evaluation.report.summary import report_data

JSON_NAME = "report.json"
HTML_NAME = "report.html"


def build_report(
    run_dirs: Sequence[Path],
    output_dir: Path,
    *,
    title: str = "What was learned and what was kept",
) -> Path:
    """Report on one or more runs.

    Args:
        run_dirs: Run folders; one run, several seeds, several methods, in any order.
        output_dir: Folder for ``report.json`` and ``report.html``; made if missing, both files
            are replaced.
        title: Heading of the page.

    Returns:
        Path of ``report.html``: self-contained, opens offline.

    Raises:
        ConfigError: matplotlib is not installed.
        DataError: A folder is no run, or holds no or damaged results.
    """
    require_matplotlib()
    output_dir = Path(output_dir)
    if output_dir.is_file():
        raise DataError(f"{output_dir} is a file; name a folder for the report.")
    data, _, _ = report_data(read_runs(run_dirs), title, provenance())
    page = render(data)
    output_dir.mkdir(parents=True, exist_ok=True)
    write_json(output_dir / JSON_NAME, data)
    path = output_dir / HTML_NAME
    _write_text(path, page)
    return path


def _write_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old one or the whole new one."""
    temporary = path.with_name(f".{path.name}.tmp-{secrets.token_hex(4)}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_path(path.parent)

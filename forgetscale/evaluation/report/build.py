"""Run folders in, ``report.json`` and ``report.html`` out; result folders in, ``models.*`` out."""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from forgetscale.artifact import fsync_path, provenance, write_json
from forgetscale.errors import DataError
from forgetscale.evaluation.report.drawing import require_matplotlib
from forgetscale.evaluation.report.models import models_data, read_evaluated, render_models
from forgetscale.evaluation.report.page import render
from forgetscale.evaluation.report.runs import read_runs
from forgetscale.evaluation.report.summary import report_data

JSON_NAME = "report.json"
HTML_NAME = "report.html"
MODELS_JSON_NAME = "models.json"
MODELS_HTML_NAME = "models.html"


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
    output_dir = _folder_for_report(output_dir)
    data, _, _ = report_data(read_runs(run_dirs), title, provenance())
    return _publish(output_dir, data, render(data), JSON_NAME, HTML_NAME)


def build_models_report(
    result_dirs: Sequence[Path], output_dir: Path, *, title: str = "Evaluated models"
) -> Path:
    """Compare evaluated models: every task with intervals, differences to the first in pairs.

    Args:
        result_dirs: Result folders of ``forgetscale evaluate``; the first is what the others are
            compared with.
        output_dir: Folder for ``models.json`` and ``models.html``; made if missing, both files are
            replaced.
        title: Heading of the page.

    Returns:
        Path of ``models.html``: self-contained, opens offline.

    Raises:
        ConfigError: matplotlib is not installed.
        DataError: A folder holds no or damaged results, or a task was changed between two.
    """
    output_dir = _folder_for_report(output_dir)
    data = models_data(read_evaluated(result_dirs), title, provenance())
    return _publish(output_dir, data, render_models(data), MODELS_JSON_NAME, MODELS_HTML_NAME)


def _folder_for_report(output_dir: Path) -> Path:
    require_matplotlib()
    output_dir = Path(output_dir)
    if output_dir.is_file():
        raise DataError(f"{output_dir} is a file; name a folder for the report.")
    return output_dir


def _publish(output_dir: Path, data: Any, page: str, json_name: str, html_name: str) -> Path:
    output_dir.mkdir(parents=True, exist_ok=True)
    write_json(output_dir / json_name, data)
    path = output_dir / html_name
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

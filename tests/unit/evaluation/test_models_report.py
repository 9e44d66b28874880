"""Evaluated models side by side: what stands out is what differs question by question."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from forgetscale.cli.main import main
from forgetscale.errors import DataError
from forgetscale.evaluation import Result, SampleRecord, write_results
from forgetscale.evaluation.report.models import (
    models_data,
    paired_difference,
    read_evaluated,
    verdict,
)

N = 200
TEXT = ("", None, "", None)


def write(folder: Path, right: np.ndarray, perplexity: float, *, task_hash: str = "h") -> Path:
    """Results of a model: recall of ``right``, and a perplexity over nine texts."""
    share = float(right.mean())
    spread = 1.96 * float(np.sqrt(share * (1 - share) / len(right)))
    results = [
        Result("recall", "accuracy", share, N, share - spread, share + spread, task_hash, True),
        Result("recall", "other", 1 - share, N, 0.0, 1.0, task_hash, True),
        Result(
            "perplexity/target",
            "perplexity",
            perplexity,
            9,
            perplexity - 1,
            perplexity + 1,
            "p",
            False,
            "perplexity",
        ),
    ]
    samples = [
        SampleRecord("recall", f"q{number}", float(value), 1.0, "", "a", "", "stop")
        for number, value in enumerate(right)
    ]
    harder = np.linspace(-1.0, 1.0, 9)  # some texts are harder, for every model
    samples += [
        SampleRecord("perplexity/target", str(n), 50 * (math.log(perplexity) + x), 50.0, *TEXT)
        for n, x in enumerate(harder)
    ]
    return write_results(folder, results, samples, settings={})


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    draw = np.random.default_rng(0)
    source = draw.random(N) < 0.7
    worse = source & ~(np.arange(N) < 10)  # ten questions lost, none gained
    noise = draw.random(N) < 0.68  # nearly as many right, but others
    return [
        write(tmp_path / "source", source, 20.0),
        write(tmp_path / "worse", worse, 12.0),
        write(tmp_path / "noise", noise, 14.0),
    ]


def test_pairs_show_what_separate_intervals_hide(folders: list[Path]) -> None:
    source, worse, noise = read_evaluated(folders)
    gap = paired_difference(source, worse, "recall")
    assert gap is not None and gap.high < 0
    one, two = source.results["recall"], worse.results["recall"]
    assert gap.value == pytest.approx(two.value - one.value)
    assert two.high > one.low, "the intervals of the two overlap"
    other = paired_difference(source, noise, "recall")
    assert other is not None and other.low < 0 < other.high
    assert paired_difference(source, worse, "recall other") is None, "no mean over the records"
    text = paired_difference(source, worse, "perplexity/target")
    assert text is not None and text.value == pytest.approx(12.0 - 20.0)
    assert text.low < -8.0 < text.high < 0, "rows of unequal difficulty, paired"
    data = models_data([source, worse, noise], "t", {})
    assert [row["name"] for row in data["abilities"]] == [
        "recall",
        "recall other",
        "perplexity/target",
    ]
    row = data["abilities"][0]
    assert [verdict(row, name) for name in data["models"]] == ["", "worse", ""]
    assert verdict(data["abilities"][2], "worse") == "better", "less perplexity is better"


def test_the_command_writes_a_page_that_opens_offline(
    folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="pip install 'forgetscale[report]'")
    output = tmp_path / "page"
    command = ["report", "--results", *map(str, folders), "--output", str(output)]
    assert main(command) == 0
    assert capsys.readouterr().out.strip() == str(output / "models.html")
    page = (output / "models.html").read_text()
    assert "worse: 1 of 2 tasks worse than source, 1 better." in page
    assert "noise: 0 of 2 tasks worse than source, 1 better." in page
    assert page.count("<svg") == 1 and not re.search(r'(?:src|href)="(?!#)', page)
    data = json.loads((output / "models.json").read_text())
    cell = data["abilities"][0]["cells"]["worse"]
    assert cell["difference"][0] == pytest.approx(
        cell["value"] - data["abilities"][0]["cells"]["source"]["value"]
    )
    assert data["abilities"][1]["cells"]["worse"]["difference"] is None


def test_names_tell_folders_apart_and_changed_tasks_are_refused(
    folders: list[Path], tmp_path: Path
) -> None:
    right = np.ones(N, dtype=bool)
    for run in ("a", "b"):
        write(tmp_path / run / "final", right, 9.0)
    names = [model.name for model in read_evaluated([tmp_path / "a/final", tmp_path / "b/final"])]
    assert names == ["a/final", "b/final"]
    write(tmp_path / "changed", right, 9.0, task_hash="other")
    with pytest.raises(DataError, match="task 'recall.*' was changed between source and changed"):
        read_evaluated([folders[0], tmp_path / "changed"])
    with pytest.raises(DataError, match="named twice"):
        read_evaluated([folders[0], folders[0]])
    assert main(["report", "--results", str(tmp_path), "--output", str(tmp_path / "o")]) == 2

"""The report shows drift, mitigation and the forgetting law where there are data for them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from forgetscale.evaluation.report import build_report
from forgetscale.evaluation.results import Result, SampleRecord, read_results, write_results

N = 100


def add_refusals(run: Path, refused: dict[str, tuple[int, int]]) -> None:
    """Add answers to a run: of ``N`` prompts a task, how many were refused before and after."""
    for folder, which in (("source", 0), ("final", 1)):
        path = run / "results" / folder
        results, samples = read_results(path), []
        for task, counts in refused.items():
            kind = "refusal" if task == "refusal" else "no_refusal"
            value = counts[which] / N
            results.append(
                Result(task, "rate", value, N, value, value, f"{task}-h", kind == "refusal", kind)
            )
            samples += [
                SampleRecord(
                    task,
                    f"{task}/{i:04d}",
                    float(i < counts[which]),
                    1.0,
                    "q",
                    "an answer",
                    "",
                    "stop",
                )
                for i in range(N)
            ]
        write_results(path, results, samples, settings={}, replace=True)


def with_adapter(run: Path, kind: str, **changes: Any) -> Path:
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"adapter": {"kind": kind}} | changes))
    return run


def report(runs: list[Path], output: Path) -> tuple[dict[str, Any], str]:
    page = build_report(runs, output)
    return json.loads((output / "report.json").read_text()), page.read_text(encoding="utf-8")


@pytest.fixture
def two(make_run) -> list[Path]:
    lora = with_adapter(make_run("sft", 1, [1.0, 0.5], [300.0, 4.0], name="lora"), "lora")
    other = make_run("ssu/paper", 1, [1.0, 0.9], [300.0, 4.0])
    add_refusals(lora, {"refusal": (95, 55), "over_refusal": (5, 1)})
    add_refusals(other, {"refusal": (95, 85), "over_refusal": (5, 25)})
    return [lora, other]


def test_drift_and_mitigation(two, tmp_path):
    data, page = report(two, tmp_path / "report")
    found = {(entry["method"], entry["kind"]): entry for entry in data["drift"]}
    assert set(found) == {
        (method, kind) for method in ("lora", "ssu/paper") for kind in ("refusal", "no_refusal")
    }
    assert found["lora", "refusal"]["drift"] == pytest.approx(0.40)
    assert found["lora", "refusal"]["mitigation"] == {}
    other = found["ssu/paper", "refusal"]
    assert other["drift"] == pytest.approx(0.10)
    assert other["mitigation"]["1"]["value"] == pytest.approx(0.75)
    assert other["low"] < 0.10 < other["high"]
    assert found["ssu/paper", "no_refusal"]["drift"] == pytest.approx(0.20), "over-refusal"
    assert found["ssu/paper", "no_refusal"]["mitigation"] == {}, "the control gained there"
    assert "Drift on unsafe prompts" in page and "Drift on safe prompts" in page
    assert "mitigation against lora" in page and "75.0 %" in page and "How forgetting" not in page


def test_over_seeds_the_interval_is_of_students_t(make_run, tmp_path):
    runs = []
    for seed, after in ((1, 60), (2, 70)):
        run = with_adapter(make_run("sft", seed, [1.0, 0.5], [300.0, 4.0]), "lora")
        add_refusals(run, {"refusal": (90, after)})
        runs.append(run)
    data, _ = report(runs, tmp_path / "report")
    (entry,) = data["drift"]
    assert entry["drift"] == pytest.approx(0.25) and entry["seeds"] == [1, 2]
    assert entry["interval"] == "t over seeds"
    half = 12.7062 * math.sqrt(2) * 0.05 / math.sqrt(2)
    assert entry["high"] == pytest.approx(0.25 + half)


def test_nothing_is_shown_without_data(make_run, tmp_path):
    data, page = report([make_run("sft", 1, [1.0, 0.5], [300.0, 4.0])], tmp_path / "report")
    assert data["drift"] == [] and data["forgetting_law"] == {}
    assert "Drift on" not in page and "How forgetting" not in page


def test_forgetting_law_over_sizes(make_run, tmp_path):
    runs = []
    for number in (2, 3, 5, 9, 13):
        recalls = [1.0] + [0.5] * (number - 1)
        run = make_run("sft", 1, recalls, [300.0] + [4.0] * (number - 1), name=f"size-{number}")
        tokens = 50 * (number - 1) * 1024
        results = [
            result
            if result.task != "perplexity/source" or result.metric != "perplexity"
            else result.from_json(
                result.to_json() | {"value": 6.0 * math.exp(0.3 * (tokens / 614400) ** 0.5)}, "-"
            )
            for result in read_results(run / "results" / "final")
        ]
        write_results(run / "results" / "final", results, [], settings={}, replace=True)
        runs.append(run)
    data, page = report(runs, tmp_path / "report")
    law = data["forgetting_law"]["sft"]
    assert law["n"] == 5 and law["unit_tokens"] == 614400
    assert law["A"]["value"] == pytest.approx(0.3, rel=1e-3)
    assert law["beta"]["value"] == pytest.approx(0.5, rel=1e-3)
    assert law["E"]["value"] == pytest.approx(0.0, abs=1e-3)
    assert "How forgetting grows" in page

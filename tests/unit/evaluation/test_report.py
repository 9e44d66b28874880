import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from forgetscale.errors import ConfigError, DataError
from forgetscale.evaluation.report import build_report

PERPLEXITY = [300.0, 40.0, 12.0, 6.0, 4.0]
ABILITIES = {
    "compliance": (0.97, 0.7),
    "refusal": (1.0, 0.9),
    "over_refusal": (0.02, 0.1),
    "code_mixing": (0.0, 0.2),
    "target_recall": (0.02, 0.4),
}
VOID = {"meta", "br"}


class Checker(HTMLParser):
    """Checks that tags close in order and collects what would be fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            outside = name in ("src", "href", "data") and not (value or "").startswith("#")
            if outside or "url(h" in (value or "") or tag in ("link", "script", "img"):
                self.fetched.append(f"{tag} {name}={value}")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes nothing"


def three_methods(make_run: Any, kept: dict[str, float], seeds: int = 3) -> list[Path]:
    dirs = []
    for method, final in kept.items():
        for seed in range(seeds):
            recalls = [1 - (1 - final) * share for share in (0, 0.5, 0.8, 0.95, 1)]
            recalls = [value - 0.01 * seed * (value < 1) for value in recalls]
            seconds = 0.5 if method == "sft" else 0.505
            dirs.append(
                make_run(
                    method, seed, recalls, PERPLEXITY, abilities=ABILITIES, step_seconds=seconds
                )
            )
    return dirs


def report(dirs: list[Path], output: Path, **options: Any) -> tuple[dict[str, Any], str]:
    path = build_report(dirs, output, **options)
    assert path == output / "report.html"
    page = path.read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert checker.fetched == []
    assert not re.search(r"(?:src|href)=.?https?:|@import|url\(['\"]?https?:", page)
    return json.loads((output / "report.json").read_text()), page


def test_full_report_has_the_public_schema(make_run: Any, tmp_path: Path) -> None:
    dirs = three_methods(make_run, {"sft": 0.1, "ssu/rand": 0.4, "ssu/paper": 0.6})
    data, page = report(dirs, tmp_path / "out")
    assert len(data["runs"]) == 9 and len(data["summary"]) == 3
    for run in data["runs"]:
        assert isinstance(run["method"], str) and isinstance(run["seed"], int)
        assert {"recall", "compliance", "bits_per_byte/source"} <= set(run["abilities"])
        for entry in [*run["abilities"].values(), run["target"]]:
            for key, kind in (("before", float), ("after", float), ("n", int)):
                assert isinstance(entry[key], kind)
            assert entry["low"] <= entry["after"] <= entry["high"]
        assert run["target"]["before"] == 300.0 and run["target"]["after"] == 4.0
        assert set(run["matched"]) == {"target_perplexity", "recall"}
        assert isinstance(run["matched"]["recall"], float)
        assert [point["name"] for point in run["matched_points"]] == ["mild", "middle", "deep"]
    by_method = {run["method"]: run for run in data["runs"]}
    assert by_method["sft"]["step_seconds"] == 0.5
    assert data["claim"]["status"] == "held"
    assert "Claim held." in page and page.count("<svg") == 4
    assert re.search(
        r"fact recall of 100% before is \d\d% with ssu/paper, \d\d% with ssu/rand", page
    )
    text = (tmp_path / "out" / "report.json").read_text()
    assert "/somewhere" not in text and str(tmp_path) not in text


def test_summary_is_the_mean_over_seeds_and_paired_with_sft(make_run: Any, tmp_path: Path) -> None:
    dirs = three_methods(make_run, {"sft": 0.1, "ssu/paper": 0.6})
    data, _ = report(dirs, tmp_path / "out")
    sft, paper = data["summary"]
    assert sft["method"] == "sft" and paper["seeds"] == [0, 1, 2]
    assert paper["abilities"]["recall"]["after"] == pytest.approx(0.59)
    deep = paper["matched_points"][2]
    assert deep["lost"]["mean"] == pytest.approx(0.41)
    assert deep["lost"]["low"] < 0.41 < deep["lost"]["high"]
    assert deep["lost_minus_control"]["mean"] == pytest.approx(-0.5)
    assert sft["matched_points"][2]["lost_minus_control"] is None
    assert data["claim"]["status"] == "not tested"
    average = paper["relative_degradation"]["mean"]
    parts = [-0.41, -0.27 / 0.97, -0.1, -0.08 / 0.98]
    assert average == pytest.approx(sum(parts) / 4, abs=1e-6)


def test_a_claim_that_fails_is_said_plainly(make_run: Any, tmp_path: Path) -> None:
    dirs = three_methods(make_run, {"sft": 0.5, "ssu/rand": 0.65, "ssu/paper": 0.6})
    data, page = report(dirs, tmp_path / "out")
    assert data["claim"]["status"] == "not held"
    assert "Claim not held." in page and "✗ no" in page


def test_one_run_alone(make_run: Any, tmp_path: Path) -> None:
    run = make_run("ssu/paper", 4, [1.0, 0.9, 0.8, 0.7, 0.6], PERPLEXITY, abilities=ABILITIES)
    data, page = report([run], tmp_path / "out")
    assert data["summary"][0]["abilities"]["recall"]["interval"] == "bootstrap over samples"
    assert "Claim" not in page
    assert "target perplexity 300 → 4.00, fact recall 1.00 → 0.60." in page


def test_only_perplexities(make_run: Any, tmp_path: Path) -> None:
    dirs = [
        make_run(method, 0, [0.9, 0.8, kept], [900.0, 120.0, 70.0], recall=False)
        for method, kept in (("sft", 0.2), ("ssu/paper", 0.6))
    ]
    data, page = report(dirs, tmp_path / "out", title="English learns Swahili")
    assert data["runs"][0]["matched"] == {"target_perplexity": None, "recall": None}
    assert data["runs"][0]["relative_degradation"]["average"] is None
    assert "target bits per byte" in page and "Claim" not in page
    assert page.count("<svg") == 3


def test_unfinished_runs_and_missing_abilities(make_run: Any, tmp_path: Path) -> None:
    whole = make_run("sft", 0, [1.0, 0.5, 0.2, 0.1], PERPLEXITY[:4], abilities=ABILITIES)
    cut = make_run("ssu/paper", 0, [1.0, 0.9, 0.8], PERPLEXITY[:3], final=False)
    data, page = report([whole, cut], tmp_path / "out")
    paper = next(run for run in data["runs"] if run["method"] == "ssu/paper")
    assert "compliance" not in paper["abilities"]
    assert paper["abilities"]["recall"]["after"] == 0.8
    assert paper["notes"] == ["after: measured in the loop at step 100"]
    assert "after: measured in the loop at step 100" in page


def test_two_runs_of_one_method_and_seed_are_told_apart(make_run: Any, tmp_path: Path) -> None:
    runs = [make_run("sft", 0, [1.0, 0.5, 0.4], PERPLEXITY[:3], name=f"lr-{lr}") for lr in (1, 2)]
    data, _ = report(runs, tmp_path / "out")
    assert [run["method"] for run in data["runs"]] == ["sft (lr-1)", "sft (lr-2)"]


def test_text_of_others_is_escaped(make_run: Any, tmp_path: Path) -> None:
    run = make_run("x<script>", 0, [1.0, 0.5, 0.4], PERPLEXITY[:3], name="a&b")
    _, page = report([run], tmp_path / "out", title="<b>& more")
    assert "&lt;b&gt;&amp; more" in page and "<script" not in page


def test_folders_that_cannot_be_reported_are_refused(make_run: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no run folder was named"):
        build_report([], tmp_path / "out")
    with pytest.raises(DataError, match=r"holds no recipe\.yaml"):
        build_report([tmp_path], tmp_path / "out")
    run = make_run("sft", 0, [1.0, 0.5, 0.4], PERPLEXITY[:3])
    (run / "results" / "final" / "results.json").write_text("{}")
    with pytest.raises(DataError, match=r"results\.json has"):
        build_report([run], tmp_path / "out")
    broken = make_run("hft", 0, [1.0, 0.5, 0.4], PERPLEXITY[:3])
    (broken / "results" / "curve.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(DataError, match="lacks results"):
        build_report([broken], tmp_path / "out")
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "recipe.yaml").write_text("run: {seed: 1}\n")
    with pytest.raises(DataError, match="holds no results"):
        build_report([empty], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tasks_changed_between_before_and_after_are_refused(make_run: Any, tmp_path: Path) -> None:
    from forgetscale.evaluation import write_results

    run = make_run("sft", 0, [1.0, 0.5, 0.4], PERPLEXITY[:3])
    changed = make_run.result("recall", 0.4, seed=99)
    write_results(run / "results" / "final", [changed], [], settings={}, replace=True)
    with pytest.raises(DataError, match="task 'recall' was changed between"):
        build_report([run], tmp_path / "out")


def test_without_matplotlib_one_sentence_says_what_to_install(
    make_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run("sft", 0, [1.0, 0.5, 0.4], PERPLEXITY[:3])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"pip install 'forgetscale\[report\]'"):
        build_report([run], tmp_path / "out")

"""The study's numbers: paired contrasts, the verdict's two intervals, the page."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from forgetscale.cli.knowledge_study import METHODS, SETTINGS
from forgetscale.cli.main import main
from forgetscale.errors import DataError
from forgetscale.knowledge.study import (
    Answered,
    Run,
    build_study_report,
    contrast,
    contrasts,
    verdict,
)

FAMILIES = ("restored", "random", "bottom", "scaled", "absolute", "base")
FRACTIONS = (0.1, 0.4)
KINDS = ("dev", "test", "plain", "other")


def selection(seed: int, gain: float, questions: int = 40) -> dict:
    """Answers where restored models are right on ``gain`` more of the same questions."""
    rng = np.random.default_rng(seed)
    base = {
        f"{kind}-{group}": (rng.random(questions) < 0.5).astype(int).tolist()
        for kind in KINDS
        for group in range(5)
    } | {"trained-g0-240": [1, 0, 1, 1]}

    def better(tasks: dict) -> dict:
        extra = np.random.default_rng(seed + 100)
        return {
            name: [max(v, int(extra.random() < gain)) for v in values]
            for name, values in tasks.items()
        }

    models = [
        {"name": f"{family}-{fraction}", "family": family, "fraction": fraction, "dev": 0.5}
        for family in FAMILIES
        for fraction in FRACTIONS
    ]
    answers = {"source": base, "tuned": base} | {
        row["name"]: better(base) if row["family"] == "restored" else base for row in models
    }
    chosen = {
        family: {"name": f"{family}-0.1", "family": family, "fraction": 0.1} for family in FAMILIES
    }
    return {"models": models, "answers": answers, "chosen": chosen}


def answered(seed: int, gain: float, group: int = 0, setting: str = "1920") -> Answered:
    run = Run(seed, group, setting, 1920, 240, 50, Path("x"), Path("y"))
    return Answered(run, selection(seed, gain))


def test_a_contrast_is_the_mean_over_groups_and_seeds_of_paired_differences():
    runs = {seed: answered(seed, 0.3) for seed in (1, 2, 3)}
    pairs = {s: [(run, "restored-0.1", "scaled-0.1")] for s, run in runs.items()}
    found = contrast(pairs)
    wanted = np.mean(
        [
            np.mean(run.values("restored-0.1", "test")[g] - run.values("tuned", "test")[g])
            for run in runs.values()
            for g in range(5)
        ]
    )
    assert found["value"] == pytest.approx(wanted)
    assert found["low"] < wanted < found["high"]
    assert found["seeds"]["num_seeds"] == 3
    # 600 questions, of which 15 % differ: standard error sqrt(.15 * .85 / 600) = 0.0146.
    assert found["high"] - found["low"] == pytest.approx(4 * 0.0146, rel=0.2)


def test_the_same_questions_in_more_runs_give_no_narrower_interval():
    run = answered(1, 0.3)
    pair = (run, "restored-0.1", "scaled-0.1")
    one, five = contrast({1: [pair]}), contrast({1: [pair] * 5})
    assert (one["low"], one["high"]) == (five["low"], five["high"])
    assert five["runs"] == 5


@pytest.mark.parametrize(
    ("gain", "status", "words"),
    [(0.5, "good", "beats"), (0.0, "open", "does not beat")],
)
def test_the_verdict_needs_both_intervals(gain, status, words):
    found = contrasts([answered(seed, gain) for seed in (1, 2, 3)])
    said = verdict(found["own_best"]["scaled"])
    assert said["status"] == status and words in said["sentence"]


def test_seeds_that_disagree_leave_it_open():
    """Questions alone would say yes; with two seeds Student's interval is too wide to say so."""
    found = contrasts([answered(1, 0.5), answered(2, 0.1)])["own_best"]["scaled"]
    assert found["low"] > 0 > found["seeds"]["low"]
    assert verdict(found)["status"] == "open"
    turned = found | {"value": -0.2, "low": -0.3, "high": -0.1}
    turned["seeds"] = found["seeds"] | {"low": -0.4, "high": -0.05}
    assert "worse" in verdict(turned)["sentence"]


def test_the_report_of_whole_runs(tmp_path: Path):
    runs = []
    for seed in (1, 2):
        for group in (0, 3):
            for setting in SETTINGS:
                sweep = tmp_path / f"{seed}-{group}-{setting.replace('/', '-')}"
                sweep.mkdir()
                (sweep / "selection.json").write_text(json.dumps(selection(seed, 0.2)))
                runs.append(Run(seed, group, setting, 240, 30, 50, sweep, sweep))
    facts = {
        seed: [{"group": n % 5, "split": "train", "exposures": 4 * (n % 2)} for n in range(20)]
        for seed in (1, 2)
    }
    path = build_study_report(runs, facts, tmp_path / "report")
    page = path.read_text(encoding="utf-8")
    data = json.loads((tmp_path / "report" / "report.json").read_text())
    assert page.count("<svg") == 2 and "http" not in page
    assert data["sizes"][0]["all"] == [4, 4, 4, 4, 4]
    assert data["sizes"][0]["by_exposures"]["0"] == [2, 2, 2, 2, 2]
    assert len(data["cells"]) == 6
    for cell in data["cells"]:
        found = cell["accuracy"]
        assert found["restored"]["test"] > found["tuned"]["test"] == found["scaled"]["test"]
        assert found["tuned"]["either"] >= found["tuned"]["test"]
    (runs[0].sweep / "selection.json").unlink()
    with pytest.raises(DataError, match="start the same command again"):
        build_study_report(runs, facts, tmp_path / "report")
    with pytest.raises(DataError, match="enough facts"):
        build_study_report([], facts, tmp_path / "report")


def test_the_quick_start_names_the_study_and_its_runs(tmp_path: Path, capsys):
    assert len(METHODS) == 15
    given = [
        "quickstart",
        "--study",
        "knowledge",
        "--methods",
        "5/1920",
        "--output",
        tmp_path / "o",
    ]
    assert main([str(word) for word in given]) == 2
    assert "'5/1920' is not one of 0/240/epochs" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()

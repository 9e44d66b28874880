"""Choosing an edit on development questions: picks, paired differences, and the command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from forgetscale.cli import main
from forgetscale.errors import ConfigError
from forgetscale.evaluation.model import load_model
from forgetscale.knowledge.selection import (
    Candidate,
    Selection,
    candidates,
    check_selection,
    choose,
    compare,
)
from forgetscale.testbed.graded import GRADED_TINY, build_graded
from tests.unit.knowledge.folders import restore

LISTED = [
    Candidate("r1", "restored", 0.1),
    Candidate("r2", "restored", 0.2),
    Candidate("s1", "scaled", 0.1),
    Candidate("s2", "scaled", 0.2),
]


def values(**rates: tuple[float, float]) -> dict:
    """Model -> tasks with exactly these shares of ones among 100 questions."""

    def ones(rate: float) -> np.ndarray:
        return (np.arange(100) < round(100 * rate)).astype(float)

    return {name: {"dev": ones(dev), "test": ones(test)} for name, (dev, test) in rates.items()}


def test_development_questions_choose_and_test_questions_do_not():
    found = values(
        source=(0.9, 0.9), tuned=(0.5, 0.5), r1=(0.7, 0.1), r2=(0.6, 0.99), s1=(0.4, 0.9),
        s2=(0.3, 0.95),
    )  # fmt: skip
    chosen = choose(found, LISTED, ["dev"])
    assert chosen["restored"].name == "r1"
    assert chosen["scaled"].name == "tuned"  # nothing beats leaving the model alone
    data = compare(found, LISTED, Selection(Path("t"), ("dev",), ("test",)))
    assert data["test"]["test"]["restored"]["value"] == pytest.approx(0.1)
    difference = data["differences"]["test"]
    assert difference["tuned"]["value"] == pytest.approx(0.1 - 0.5)
    assert difference["same_fraction"]["scaled"]["value"] == pytest.approx(0.1 - 0.9)
    assert difference["tuned"]["low"] < -0.4 < difference["tuned"]["high"] < 0


def test_of_equals_the_smaller_edit_is_picked():
    found = values(source=(1, 1), tuned=(0.5, 0), r1=(0.8, 0), r2=(0.8, 1), s1=(0.5, 1), s2=(0, 0))
    chosen = choose(found, LISTED, ["dev"])
    assert [chosen[name].name for name in ("restored", "scaled")] == ["r1", "tuned"]


def test_differences_are_paired():
    """The same questions wrong: no width, however far from 0 or 1 the share is."""
    found = values(source=(1, 1), tuned=(0.5, 0.5), r1=(0.6, 0.5), r2=(0, 0), s1=(0, 0), s2=(0, 0))
    row = compare(found, LISTED, Selection(Path("t"), ("dev",), ("test",)))["differences"]["test"]
    assert row["tuned"] == {"value": 0.0, "low": 0.0, "high": 0.0}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """An untrained model as source, a noisy copy as tuned, questions on what the source says."""
    root = tmp_path_factory.mktemp("selection")
    source = build_graded(root / "world", seed=3, size=GRADED_TINY) / "init"
    tuned = root / "tuned"
    tuned.mkdir()
    for path in source.iterdir():
        if path.name != "model.safetensors":
            (tuned / path.name).write_bytes(path.read_bytes())
    torch.manual_seed(0)
    weights = load_file(source / "model.safetensors")
    noisy = {n: w + 0.3 * torch.randn_like(w) if "layers" in n else w for n, w in weights.items()}
    save_file(noisy, tuned / "model.safetensors", {"format": "pt"})
    loaded = load_model(source)
    facts = [
        json.loads(line)
        for line in (root / "world" / "facts.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    tasks = root / "tasks"
    tasks.mkdir()
    for name, own in (("dev", facts[:8]), ("test", facts[8:20])):
        rows = []
        for fact in own:
            turns = [{"role": "user", "content": fact["questions"][0]}]
            text = loaded.tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=True
            )
            ids = torch.tensor([loaded.tokenizer(text, add_special_tokens=False)["input_ids"]])
            said = loaded.model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
            start = loaded.tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True)
            checks = [{"kind": "equals", "text": start.strip()}]
            rows.append({"id": fact["id"], "kind": "check", "messages": turns, "checks": checks})
        (tasks / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = json.loads((tasks / "dev.jsonl").read_text().splitlines()[0]) | {"id": "renamed"}
    (tasks / "mixed.jsonl").write_text(json.dumps(shared) + "\n")
    return source, tuned, tasks


def asked(tasks: Path, *more: object) -> tuple[object, ...]:
    sweep = ("--fraction", "0.3", "0.9", "--controls", "--also-score", "base")
    questions = ("--task-dir", tasks, "--dev-tasks", "dev", "--test-tasks", "test")
    return (*sweep, *questions, "--max-new-tokens", "3", *more)


def test_the_command_sweeps_chooses_and_reports(models, tmp_path: Path, capsys):
    source, tuned, tasks = models
    output = tmp_path / "out"
    options = asked(tasks, "--keep", "chosen")
    assert restore(source, tuned, output, *options) == 0
    first = capsys.readouterr().out
    data = json.loads((output / "selection.json").read_text())
    assert data["dev_score"]["source"] == 1.0 > data["dev_score"]["tuned"]
    kinds = {row["family"] for row in data["models"]}
    assert kinds == {"restored", "random", "bottom", "scaled", "base"}
    for row in data["models"]:
        assert row["dev"] == np.mean(data["answers"][row["name"]]["dev"])
    pick = data["chosen"]["restored"]["name"]
    shown = np.array(data["answers"][pick]["test"])
    assert data["test"]["test"]["restored"]["value"] == pytest.approx(shown.mean())
    over = shown - np.array(data["answers"]["tuned"]["test"])
    assert data["differences"]["test"]["tuned"]["value"] == pytest.approx(over.mean())
    kept = {choice["name"] for choice in data["chosen"].values()} - {"tuned"}
    assert {path.name for path in output.iterdir() if path.is_dir()} == kept
    assert (output / "selection.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    # The same command again: nothing is written or asked again, the table is the same.
    assert restore(source, tuned, output, *options) == 0
    again = capsys.readouterr().out
    assert again.splitlines() == first.splitlines()[-len(again.splitlines()) :]


def test_answers_that_are_there_are_not_asked_for_again(models, tmp_path: Path, monkeypatch):
    source, tuned, tasks = models
    output = tmp_path / "out"
    from forgetscale.knowledge import selection as module

    real, calls = module._answers, []

    def dies(evaluator, chosen):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(evaluator, chosen)

    monkeypatch.setattr(module, "_answers", dies)
    assert restore(source, tuned, output, *asked(tasks)) == 130
    assert restore(source, tuned, output, *asked(tasks)) == 0
    assert len(calls) == 4 + 2 + 10 - 3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("--dev-tasks", "dev", "--test-tasks", "mixed", "--task-dir"), "development question too"),
        (("--dev-tasks", "dev", "--task-dir"), "go together"),
        (("--dev-tasks", "dev", "--test-tasks", "tesst", "--task-dir"), "nearest: 'test'"),
    ],
)
def test_what_cannot_choose_is_refused_before_anything_is_written(
    models, tmp_path: Path, capsys, change, said
):
    source, tuned, tasks = models
    options = ("--fraction", "0.3", "0.9", *change, tasks)
    assert restore(source, tuned, tmp_path / "out", *options) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_one_edit_leaves_nothing_to_choose(models, tmp_path: Path, capsys):
    source, tuned, tasks = models
    options = ("--fraction", "0.3", "--task-dir", tasks, "--dev-tasks", "dev", "--test-tasks")
    assert restore(source, tuned, tmp_path / "out", *options, "test") == 2
    assert "nothing to choose" in capsys.readouterr().err


@pytest.mark.parametrize("score", ["relative", "random"])
def test_another_score_is_another_one(models, tmp_path: Path, capsys, score):
    source, tuned, _ = models
    folders = ["--source", source, "--tuned", tuned, "--output", tmp_path / "out"]
    given = ["--fraction", "0.3", "--score", score, "--also-score", score]
    code = None
    try:
        code = main(["restore", *map(str, folders + given)])
    except SystemExit as stop:
        code = stop.code
    assert code == 2


def test_answers_that_are_not_right_or_wrong_cannot_choose(tmp_path: Path):
    row = {"id": "a", "messages": [{"role": "user", "content": "q"}], "answers": ["x"]}
    for name, kind in (("dev", "chrf"), ("test", "exact")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row | {"kind": kind, "meta": {}}))
    with pytest.raises(ConfigError, match=r"'dev' is of kind 'chrf', whose answers are not right"):
        check_selection(Selection(tmp_path, ("dev",), ("test",)))


def test_candidates_put_the_restoration_first():
    from forgetscale.knowledge.edits import EditOptions, parse_fraction, plan_edits

    fractions = tuple(map(parse_fraction, ("0.1", "0.4")))
    options = EditOptions(fractions=fractions, controls=True, also_scores=("absolute",))
    listed = candidates(plan_edits(options, 1).variants)
    assert [c.family for c in listed[:2]] == ["restored", "restored"]
    assert sorted({c.family for c in listed}) == [
        "absolute", "bottom", "random", "restored", "scaled",
    ]  # fmt: skip
    assert {c.fraction for c in listed} == {0.1, 0.4}

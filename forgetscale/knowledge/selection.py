"""Choose among edits of a model on one set of questions, report on another.

Whoever picks the best of many edits on the questions they report has measured their luck too. Here
every edit answers development questions, each kind of edit picks its best there (leaving the model
as tuned is always among the choices), and only the picks are compared on test questions: restored
against tuned, against what every control picked, and against each control at the same fraction.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from forgetscale.artifact import canonical_json, hash_bytes, provenance, write_json
from forgetscale.errors import ConfigError, DataError
from forgetscale.evaluation.bootstrap import bootstrap_mean, interval_seed
from forgetscale.evaluation.collective import SingleProcess
from forgetscale.evaluation.forced import MeasureSettings
from forgetscale.evaluation.model import ModelEvaluator, load_model
from forgetscale.evaluation.report.drawing import require_matplotlib
from forgetscale.evaluation.scoring import METRICS
from forgetscale.evaluation.tasks import check_task_names, is_perplexity, load_chat_task
from forgetscale.knowledge.edits import Variant
from forgetscale.knowledge.selection_page import render

JSON_NAME, HTML_NAME, ANSWERS_NAME = "selection.json", "selection.html", "answers"
SOURCE, TUNED = "source", "tuned"
_LEAST_RESAMPLES = 1000
Values = dict[str, np.ndarray]
"""Task -> 1 for each good answer and 0 for each bad one, ``[questions]``."""


@dataclass(frozen=True, slots=True)
class Selection:
    """What is asked to choose and to report.

    Args:
        task_dir: Folder of tasks.
        dev: Chat tasks that decide; their mean does.
        test: Chat tasks that are reported; no question of them is one of ``dev``.
        batch_size: Sequences in a forward call.
        max_new_tokens: Longest generated answer; questions of kind ``exact`` need none.
        seed: Of the bootstrap.
        keep: ``all`` edited models, or only those that were ``chosen``.
    """

    task_dir: Path
    dev: tuple[str, ...]
    test: tuple[str, ...]
    batch_size: int = 32
    max_new_tokens: int = 64
    seed: int = 42
    keep: str = "all"


@dataclass(frozen=True, slots=True)
class Candidate:
    """One model among which is chosen."""

    name: str
    family: str
    """Kind of edit: ``restored``, ``random``, ``scaled``, ``bottom``, another score."""
    fraction: float


def candidates(variants: Sequence[Variant]) -> list[Candidate]:
    """Return what a sweep wrote, by kind; the restorations asked for first."""
    found = []
    for variant in variants:
        label = dict(variant.label)
        family = str(label.get("control", "restored"))
        found.append(Candidate(variant.name, family, float(label["fraction"])))
    return sorted(found, key=lambda candidate: candidate.family != "restored")


def check_selection(selection: Selection) -> dict[str, str]:
    """Check tasks before anything is written.

    Returns:
        Task -> hash of its content.

    Raises:
        ConfigError: A task cannot decide or be reported.
        DataError: A task is missing, or a test question is among the development questions.
    """
    if not selection.dev or not selection.test:
        raise ConfigError("--dev-tasks and --test-tasks go together; name at least one of each.")
    names = [*selection.dev, *selection.test]
    for name in names:
        if is_perplexity(name):
            raise ConfigError(f"task {name!r} has no right and wrong answers; name a chat task.")
    if selection.batch_size < 1 or selection.max_new_tokens < 1:
        raise ConfigError("--batch-size and --max-new-tokens must be >= 1.")
    check_task_names(names, selection.task_dir)
    tasks = {name: load_chat_task(selection.task_dir, name) for name in names}
    for name, task in tasks.items():
        if task.kind not in METRICS:
            raise ConfigError(
                f"task {name!r} is of kind {task.kind!r}, whose answers are not right or wrong;"
                f" choose among edits by {', '.join(METRICS)}."
            )
    asked = {
        canonical_json([dict(turn) for turn in question.messages])
        for name in selection.dev
        for question in tasks[name].questions
    }
    for name in selection.test:
        for question in tasks[name].questions:
            if canonical_json([dict(turn) for turn in question.messages]) in asked:
                raise DataError(
                    f"{selection.task_dir}: question {question.id!r} of {name} is a development"
                    " question too; a result on what decided is no result, part the questions."
                )
    return {name: task.task_hash for name, task in tasks.items()}


def ask_models(
    folders: Mapping[str, Path],
    selection: Selection,
    answers: Path,
    stamps: Mapping[str, str],
    log: Callable[[str], None],
) -> tuple[dict[str, Values], dict[str, list[str]]]:
    """Let every model answer every question; finished models are kept in ``answers``.

    Args:
        folders: Model name -> folder, all of one architecture and tokenizer.
        selection: Tasks.
        answers: Folder of one file per finished model.
        stamps: Model name -> what its answers depend on; an older file is not used.
        log: Receives one line per model.

    Returns:
        Model -> task -> values, and task -> ids of its questions.
    """
    answers.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys([*selection.dev, *selection.test]))
    evaluator: ModelEvaluator | None = None
    found: dict[str, Values] = {}
    ids: dict[str, list[str]] = {}
    for name, folder in folders.items():
        path = answers / f"{name}.json"
        stored = json.loads(path.read_bytes()) if path.is_file() else {}
        if stored.get("stamp") != stamps[name]:
            if evaluator is None:
                evaluator = ModelEvaluator(
                    load_model(folder),
                    names,
                    selection.task_dir,
                    max_new_tokens=selection.max_new_tokens,
                )
            else:
                evaluator.use(_load_weights(folder))
            stored = {"stamp": stamps[name], "tasks": _answers(evaluator, selection)}
            write_json(path, stored)
        found[name] = {
            task: np.array(rows["values"], dtype=np.float64)
            for task, rows in stored["tasks"].items()
        }
        ids = {task: rows["ids"] for task, rows in stored["tasks"].items()}
        shown = ", ".join(f"{task} {found[name][task].mean():.4f}" for task in names)
        log(f"{name}: {shown}")
    return found, ids


def _load_weights(folder: Path) -> Any:
    first: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype="auto",
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
    )
    return first.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def _answers(evaluator: ModelEvaluator, selection: Selection) -> dict[str, Any]:
    settings = MeasureSettings(selection.batch_size, selection.seed, _LEAST_RESAMPLES)
    results, samples = evaluator.evaluate(SingleProcess(), settings)
    good = {result.task: METRICS[result.kind][1] for result in results}
    rows: dict[str, Any] = {name: {"ids": [], "values": []} for name in good}
    for sample in samples:
        value = int(sample.value)
        rows[sample.task]["ids"].append(sample.id)
        rows[sample.task]["values"].append(value if good[sample.task] else 1 - value)
    return rows


def choose(
    found: Mapping[str, Values], listed: Sequence[Candidate], dev: Sequence[str]
) -> dict[str, Candidate]:
    """Return kind of edit -> its best on the development tasks.

    The mean over tasks decides; of equals the smaller fraction. Fraction 0, the model as tuned, is
    a choice of every kind.
    """
    unedited = Candidate(TUNED, "", 0.0)
    chosen = {}
    for family in dict.fromkeys(candidate.family for candidate in listed):
        own = sorted(
            [unedited, *(candidate for candidate in listed if candidate.family == family)],
            key=lambda candidate: candidate.fraction,
        )
        chosen[family] = max(own, key=lambda candidate: dev_score(found[candidate.name], dev))
    return chosen


def dev_score(values: Values, dev: Sequence[str]) -> float:
    """Return the mean over development tasks of the share of good answers."""
    return float(np.mean([values[task].mean() for task in dev]))


def _interval(values: np.ndarray, seed: int, task: str) -> dict[str, float]:
    return asdict(bootstrap_mean(values, interval_seed(seed, task)))


def compare(
    found: Mapping[str, Values], listed: Sequence[Candidate], selection: Selection
) -> dict[str, Any]:
    """Choose on development tasks and compare on test tasks, with paired bootstrap intervals.

    Args:
        found: Model -> task -> values; ``source`` and ``tuned`` among the models.
        listed: The edits.
        selection: Tasks.

    Returns:
        ``chosen`` by kind; ``test``: task -> share of good answers of source, tuned and every
        pick; ``differences``: task -> what the picked restoration gains over each of them and
        over each control at its fraction. Intervals are 95 %, over questions.
    """
    chosen = choose(found, listed, selection.dev)
    pick = chosen["restored"]
    at_fraction = {
        c.family: c.name for c in listed if c.family != "restored" and c.fraction == pick.fraction
    }
    test: dict[str, Any] = {}
    differences: dict[str, Any] = {}
    for task in selection.test:

        def over(name: str, task: str = task) -> dict[str, float]:
            difference = found[pick.name][task] - found[name][task]
            return _interval(difference, selection.seed, task)

        test[task] = {
            name: _interval(found[name][task], selection.seed, task) for name in (SOURCE, TUNED)
        } | {
            family: _interval(found[choice.name][task], selection.seed, task)
            for family, choice in chosen.items()
        }
        differences[task] = {
            "tuned": over(TUNED),
            "chosen": {f: over(c.name) for f, c in chosen.items() if f != "restored"},
            "same_fraction": {family: over(name) for family, name in at_fraction.items()},
        }
    return {
        "chosen": {family: asdict(choice) for family, choice in chosen.items()},
        "test": test,
        "differences": differences,
    }


def selection_digest(selection: Selection, request: str, hashes: Mapping[str, str]) -> str:
    """Return a hash of all that decides the result."""
    return hash_bytes(canonical_json([repr(selection), request, dict(hashes)]))


def is_selected(output: Path, digest: str) -> bool:
    """Say whether the folder holds the result of this very selection.

    Raises:
        DataError: It holds that of another one.
    """
    path = output / JSON_NAME
    if not path.is_file():
        return False
    if json.loads(path.read_bytes())["digest"] != digest:
        raise DataError(f"{path} is of another selection; name another --output or remove it.")
    return True


def run_selection(
    selection: Selection,
    listed: Sequence[Candidate],
    folders: Mapping[str, Path],
    output: Path,
    digest: str,
    log: Callable[[str], None],
) -> dict[str, Any]:
    """Ask all models, choose, compare, and write ``selection.json`` and ``selection.html``.

    Args:
        selection: Tasks and what is kept.
        listed: The edits.
        folders: Folder of every edit, of ``source`` and of ``tuned``.
        output: Folder of the sweep.
        digest: See ``selection_digest``.
        log: Receives one line per model.

    Returns:
        Content of ``selection.json``.
    """
    require_matplotlib()
    stamps = {name: digest for name in folders}
    found, ids = ask_models(folders, selection, output / ANSWERS_NAME, stamps, log)
    compared = compare(found, listed, selection)
    data = {
        "title": "Which edit, chosen on development questions",
        "digest": digest,
        "source": str(folders[SOURCE]),
        "tuned": str(folders[TUNED]),
        "dev": list(selection.dev),
        "models": [
            asdict(candidate) | {"dev": dev_score(found[candidate.name], selection.dev)}
            for candidate in listed
        ],
        "dev_score": {name: dev_score(found[name], selection.dev) for name in (SOURCE, TUNED)},
        **compared,
        "answers": {
            name: {task: [int(v) for v in values] for task, values in tasks.items()}
            for name, tasks in found.items()
        },
        "questions": ids,
        "made_by": provenance(),
    }
    page = render(data)
    if selection.keep == "chosen":
        kept = {entry["name"] for entry in data["chosen"].values()}
        for candidate in listed:
            if candidate.name not in kept:
                shutil.rmtree(folders[candidate.name])
    (output / HTML_NAME).write_text(page, encoding="utf-8")
    write_json(output / JSON_NAME, data)
    shutil.rmtree(output / ANSWERS_NAME)
    return data


def table(data: Mapping[str, Any]) -> str:
    """Return the result as lines of text."""
    lines = []
    for family, choice in data["chosen"].items():
        name = "left as tuned" if choice["name"] == TUNED else choice["name"]
        lines.append(f"chosen on {', '.join(data['dev'])}: {family}: {name}")
    for task, rows in data["test"].items():
        lines.append(f"{task}:")
        for name, value in rows.items():
            lines.append(
                f"  {name}: {value['value']:.4f} [{value['low']:.4f}, {value['high']:.4f}]"
            )
        found = data["differences"][task]
        pairs = {"tuned": found["tuned"]}
        pairs |= {f"{name} (own best)": value for name, value in found["chosen"].items()}
        pairs |= {f"{n} (same fraction)": value for n, value in found["same_fraction"].items()}
        for name, value in pairs.items():
            lines.append(
                f"  restored - {name}: {value['value']:+.4f}"
                f" [{value['low']:+.4f}, {value['high']:+.4f}]"
            )
    return "\n".join(lines)

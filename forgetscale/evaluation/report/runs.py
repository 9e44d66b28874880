"""Reading run folders: recipe, results before and after, curve, training metrics."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from forgetscale.artifact import read_manifest
from forgetscale.config import parse_yaml
from forgetscale.errors import ConfigError, DataError
from forgetscale.evaluation.degradation import name_abilities
from forgetscale.evaluation.drift import Answers, read_answers
from forgetscale.evaluation.report.text_style import read_style
from forgetscale.evaluation.results import Result, read_results

TARGET = "perplexity/target"
RECALL = "recall"
_WARMUP_ROWS = 3


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """What was measured at one step of training: ability name -> value."""

    step: int
    target_tokens: int
    values: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Run:
    """One run folder as the report sees it.

    Attributes:
        folder: Name of the folder.
        method: ``sft``, ``hft``, ``ssu/paper`` and so on.
        seed: ``run.seed``.
        recipe: Resolved recipe.
        before: Ability name -> result of the source model.
        after: Ability name -> result of the adapted model.
        curve: In-loop evaluations in order of steps, step 0 included where it is known.
        losses: Step and training loss in nats per target token.
        step_seconds: Median time of a step, first steps left out; None if unknown.
        versions: Package versions and commit that made the results.
        notes: What a reader must know about this run.
        kind: The method's name before runs of one method and seed were told apart.
        answers_before: Kind of refusal task -> judged answers of the source model.
        answers_after: The same of the adapted model.
        mixed_share: Share of target tokens that did not come from the first set of a mixture; None
            without a mixture.
        style: What ``forgetscale generate --style`` measured; empty if it did not.
    """

    folder: str
    method: str
    seed: int
    recipe: Mapping[str, Any]
    before: Mapping[str, Result]
    after: Mapping[str, Result]
    curve: tuple[CurvePoint, ...]
    losses: tuple[tuple[int, float], ...]
    step_seconds: float | None
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    kind: str = ""
    answers_before: Mapping[str, Answers] = field(default_factory=dict)
    answers_after: Mapping[str, Answers] = field(default_factory=dict)
    mixed_share: float | None = None
    style: Mapping[str, Any] = field(default_factory=dict)


def read_runs(run_dirs: Sequence[Path]) -> list[Run]:
    """Read run folders, sorted by method and seed.

    Two runs of one method and seed (say, two learning rates) are told apart by their folder.

    Raises:
        DataError: There is no folder, or one holds no run or no results.
    """
    if not run_dirs:
        raise DataError("no run folder was named; name at least one to report on.")
    runs = [read_run(Path(path)) for path in run_dirs]
    numbers = Counter((run.method, run.seed) for run in runs)
    runs = [
        replace(run, method=f"{run.method} ({run.folder})")
        if numbers[run.method, run.seed] > 1
        else run
        for run in runs
    ]
    return sorted(runs, key=lambda run: (method_rank(run.method), run.method, run.seed))


_ORDER = (
    "sft",
    "lora",
    "freeze_layers",
    "hft",
    "ssu/rand",
    "ssu/mag_l1",
    "ssu/mag_l2",
    "ssu/official",
    "ssu/paper",
)


def method_rank(method: str) -> int:
    """Return where a method stands in tables: controls first, unknown ones last."""
    return _ORDER.index(method) if method in _ORDER else len(_ORDER)


def method_label(method: Mapping[str, Any]) -> str:
    """Return ``kind`` or ``kind/score`` of the recipe's method section, ``+shield`` with rows.

    Another axis than columns follows the score, as in ``ssu/paper/row``, and another share than one
    half the axis, as in ``ssu/paper@0.7``.
    """
    kind = str(method.get("kind", "sft"))
    axis = method.get("axis", "column")
    axis = "" if axis == "column" else f"/{axis}"
    axis += "-global" if method.get("scope", "tensor") == "global" else ""
    fraction = method.get("frozen_fraction", 0.5)
    axis += "" if fraction == 0.5 else f"@{fraction:g}"
    shield = "+shield" if method.get("shield_rows") else ""
    return f"{kind}/{method['score']}{axis}{shield}" if method.get("score") else kind


def recipe_label(recipe: Mapping[str, Any]) -> str:
    """Return the method's label, or the adapter's kind where plain training goes through one."""
    label = method_label(recipe.get("method") or {})
    adapter = recipe.get("adapter")
    return str(adapter["kind"]) if adapter and label == "sft" else label


def read_run(path: Path) -> Run:
    """Read one run folder; see ``Run``.

    Raises:
        DataError: The folder holds no recipe, no results, or damaged ones.
    """
    recipe = _read_recipe(path)
    curve_results = list(_read_curve(path / "results" / "curve.jsonl"))
    before, before_made_by = _read_folder(path / "results" / "source")
    after, after_made_by = _read_folder(path / "results" / "final")
    notes = []
    if not before and curve_results and curve_results[0][0] == 0:
        before = curve_results[0][2]
        notes.append("before: measured in the loop at step 0")
    if not after and curve_results and curve_results[-1][0] > 0:
        after = curve_results[-1][2]
        notes.append(f"after: measured in the loop at step {curve_results[-1][0]}")
    if not before and not after:
        raise DataError(
            f"{path} holds no results (results/source, results/final, results/curve.jsonl);"
            " evaluate the run before reporting on it."
        )
    for name in set(before) & set(after):
        if before[name].task_hash != after[name].task_hash:
            raise DataError(
                f"{path}: task {name!r} was changed between the evaluation before"
                f" ({before[name].task_hash[:8]}) and after ({after[name].task_hash[:8]});"
                " evaluate both on the same tasks."
            )
    rows = list(_json_lines(path / "metrics.jsonl"))
    seconds = [float(row["step_seconds"]) for row in rows if "step_seconds" in row]
    settled = seconds[_WARMUP_ROWS:] if len(seconds) > 2 * _WARMUP_ROWS else seconds
    made_by = after_made_by or before_made_by
    label = recipe.get("run", {}).get("label") or recipe_label(recipe)
    return Run(
        folder=path.resolve().name,
        method=label,
        seed=int(recipe.get("run", {}).get("seed", 0)),
        recipe=recipe,
        before=before,
        after=after,
        curve=_curve_points(curve_results, before),
        losses=tuple((int(row["step"]), float(row["loss"])) for row in rows if "loss" in row),
        step_seconds=median(settled) if settled else None,
        versions={**made_by.get("versions", {}), "commit": str(made_by.get("commit"))},
        notes=tuple(notes),
        kind=label,
        answers_before=_read_answers(path / "results" / "source"),
        answers_after=_read_answers(path / "results" / "final"),
        mixed_share=_mixed_share(recipe, rows),
        style=read_style(path / "results"),
    )


def _mixed_share(recipe: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the share of target tokens, over the run, of all sets but the first."""
    data = recipe.get("data") or {}
    if data.get("kind") != "mixture" or not rows:
        return None
    first = data["sets"][0]
    name = first.get("name") or Path(first["path"]).name
    for unit in ("target", "token"):
        share = rows[-1].get(f"data/{unit}_share/{name}")
        if share is not None:
            return 1.0 - float(share)
    return None


def _read_answers(path: Path) -> dict[str, Answers]:
    return read_answers(path) if path.is_dir() else {}


def _read_recipe(path: Path) -> dict[str, Any]:
    file = path / "recipe.yaml"
    if not file.is_file():
        raise DataError(f"{path} holds no recipe.yaml, so it is no run folder; check the path.")
    try:
        recipe = parse_yaml(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ConfigError) as error:
        raise DataError(f"{file} is not valid YAML ({error}).") from error
    if not isinstance(recipe, dict):
        raise DataError(f"{file} holds a {type(recipe).__name__}, expected a recipe.")
    return recipe


def _read_folder(path: Path) -> tuple[dict[str, Result], dict[str, Any]]:
    """Return the results of a folder by ability name and what made them; empty if there is none."""
    if not path.is_dir():
        return {}, {}
    return name_abilities(read_results(path)), read_manifest(path)["made_by"]


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        return
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path} line {number} is not valid JSON ({error.msg}).") from None
            if not isinstance(row, dict):
                raise DataError(f"{path} line {number} holds no JSON object.")
            yield row


def _read_curve(path: Path) -> Iterator[tuple[int, int, dict[str, Result]]]:
    """Yield step, target tokens and results in order of steps; a repeated step counts once."""
    points: dict[int, tuple[int, dict[str, Result]]] = {}
    for number, row in enumerate(_json_lines(path), start=1):
        if missing := {"step", "target_tokens", "results"} - set(row):
            raise DataError(f"{path} evaluation {number} lacks {sorted(missing)[0]}.")
        results = [Result.from_json(value, f"{path} line {number}") for value in row["results"]]
        points[int(row["step"])] = (int(row["target_tokens"]), name_abilities(results))
    for step in sorted(points):
        yield step, *points[step]


def _curve_points(
    results: Sequence[tuple[int, int, dict[str, Result]]], before: Mapping[str, Result]
) -> tuple[CurvePoint, ...]:
    """Return the curve; step 0 is the source model's results where they asked the same."""
    points = [
        CurvePoint(step, tokens, {name: result.value for name, result in named.items()})
        for step, tokens, named in results
    ]
    if points and points[0].step > 0:
        first = results[0][2]
        same = {
            name: result.value
            for name, result in before.items()
            if name in first and first[name].task_hash == result.task_hash
        }
        if same:
            points.insert(0, CurvePoint(0, 0, same))
    return tuple(points)

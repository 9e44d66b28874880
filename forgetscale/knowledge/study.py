"""Numbers of the study ``knowledge``: does restoration beat making the whole change smaller?

A run is a model tuned on facts of one mastery group, with a sweep of edits that all answered the
same questions. Accuracy is the mean over the mastery groups of the untouched facts asked (Ye et
al., arXiv:2509.16596, section 7). Differences are paired: by question, and by seed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from forgetscale.artifact import provenance, write_json
from forgetscale.errors import DataError
from forgetscale.evaluation.bootstrap import NUM_RESAMPLES, interval_seed
from forgetscale.evaluation.report.drawing import require_matplotlib
from forgetscale.evaluation.report.seeds import seed_mean
from forgetscale.knowledge.selection import JSON_NAME as SELECTION_NAME
from forgetscale.knowledge.selection import SOURCE, TUNED
from forgetscale.knowledge.study_page import render
from forgetscale.ops.knowledge import GROUPS

DEV, TEST, PLAIN, OTHER, TRAINED = "dev", "test", "plain", "other", "trained"
"""Questions that choose; untouched facts in the taught style; the same in the style of the source;
facts of relations that were never tuned on; conversations that were trained on."""
EITHER = "either"
"""``TEST`` or ``PLAIN`` right: what is known, whatever the style."""
CAPS: Mapping[str, int] = {DEV: 24, TEST: 40, PLAIN: 40, OTHER: 30}
"""Most questions of each mastery group."""
JSON_NAME, HTML_NAME = "report.json", "report.html"
RESTORED, SCALED = "restored", "scaled"


@dataclass(frozen=True, slots=True)
class Run:
    """One tuned model and where its sweep lies."""

    seed: int
    group: int
    setting: str
    conversations: int
    steps: int
    facts: int
    """Facts of the group to tune on."""
    folder: Path
    sweep: Path


@dataclass(frozen=True, slots=True)
class Answered:
    """A run with the answers of its models."""

    run: Run
    data: Mapping[str, Any]

    def values(self, model: str, kind: str) -> dict[int, np.ndarray]:
        """Return mastery group -> 1 or 0 for each question of a kind."""
        tasks = self.data["answers"][model]
        if kind == EITHER:
            plain = self.values(model, PLAIN)
            return {g: np.maximum(v, plain[g]) for g, v in self.values(model, TEST).items()}
        return {
            group: np.array(tasks[f"{kind}-{group}"], dtype=np.float64)
            for group in range(GROUPS)
            if f"{kind}-{group}" in tasks
        }

    def accuracy(self, model: str, kind: str) -> float:
        """Return the mean over mastery groups of the share of good answers."""
        return fmean(float(values.mean()) for values in self.values(model, kind).values())

    def trained(self, model: str) -> float:
        """Return the share of good answers to what was trained on."""
        tasks = self.data["answers"][model]
        return float(np.mean(next(v for name, v in tasks.items() if name.startswith(TRAINED))))

    def chosen(self, family: str) -> str:
        """Return the model a kind of edit picked on development questions."""
        return str(self.data["chosen"][family]["name"])

    def at(self, family: str, fraction: float) -> str:
        """Return the model of a kind of edit at a fraction."""
        return next(
            str(row["name"])
            for row in self.data["models"]
            if row["family"] == family and row["fraction"] == fraction
        )

    @property
    def families(self) -> list[str]:
        """Return the kinds of edits, the restoration first."""
        return list(self.data["chosen"])

    @property
    def fractions(self) -> list[float]:
        """Return the fractions of the sweep."""
        return sorted({row["fraction"] for row in self.data["models"]})


Pairs = Mapping[int, Sequence[tuple[Answered, str, str]]]
"""Seed -> runs with the two models that are compared."""


def contrast(pairs: Pairs, kind: str = TEST) -> dict[str, Any]:
    """Return the mean difference of two models over runs, with two 95 % intervals.

    Runs of a seed answer the same questions, so questions are resampled for all of them together,
    within mastery groups and seeds. The other interval is Student's over seeds, which also holds
    the chance of worlds and training.

    Args:
        pairs: Runs of each seed, with a first and a second model; the first minus the second.
        kind: Which questions.
    """
    means: dict[int, dict[int, np.ndarray]] = {}
    for seed, rows in pairs.items():
        differences = [
            {
                g: run.values(first, kind)[g] - values
                for g, values in run.values(second, kind).items()
            }
            for run, first, second in rows
        ]
        means[seed] = {g: np.mean([row[g] for row in differences], axis=0) for g in differences[0]}
    by_seed = {s: fmean(float(v.mean()) for v in groups.values()) for s, groups in means.items()}
    generator = interval_seed(0, f"contrast/{kind}")
    resampled = np.zeros(NUM_RESAMPLES)
    for groups in means.values():
        for values in groups.values():
            drawn = generator.integers(0, len(values), size=(NUM_RESAMPLES, len(values)))
            resampled += values[drawn].mean(axis=1) / (len(groups) * len(means))
    low, high = np.quantile(resampled, [0.025, 0.975])
    over_seeds = seed_mean(list(by_seed.values()))
    assert over_seeds is not None
    return {
        "value": fmean(by_seed.values()),
        "low": float(low),
        "high": float(high),
        "seeds": over_seeds.to_json(),
        "by_seed": {str(seed): value for seed, value in by_seed.items()},
        "runs": sum(len(rows) for rows in pairs.values()),
    }


def _pairs(runs: Sequence[Answered], first: Any, second: Any) -> Pairs:
    found: dict[int, list[tuple[Answered, str, str]]] = {}
    for run in runs:
        found.setdefault(run.run.seed, []).append((run, first(run), second(run)))
    return found


def _equal_distance(runs: Sequence[Answered], family: str, other: str) -> Pairs:
    """Return pairs at every fraction: no choice is made, and distances are equal for ``scaled``."""
    found: dict[int, list[tuple[Answered, str, str]]] = {}
    for run in runs:
        for fraction in run.fractions:
            pair = (run, run.at(family, fraction), run.at(other, fraction))
            found.setdefault(run.run.seed, []).append(pair)
    return found


def contrasts(runs: Sequence[Answered], kind: str = TEST) -> dict[str, Any]:
    """Return all comparisons of restoration over some runs.

    Args:
        runs: Runs with the same kinds of edits.
        kind: Which questions.
    """
    controls = [family for family in runs[0].families if family != RESTORED]

    def own(family: str) -> Pairs:
        return _pairs(runs, lambda run: run.chosen(RESTORED), lambda run: run.chosen(family))

    return {
        "tuned": contrast(_pairs(runs, lambda run: run.chosen(RESTORED), lambda run: TUNED), kind),
        "own_best": {family: contrast(own(family), kind) for family in controls},
        "equal_fraction": {
            family: contrast(_equal_distance(runs, RESTORED, family), kind) for family in controls
        },
    }


def verdict(found: Mapping[str, Any]) -> dict[str, str]:
    """Say whether restoration beats norm-matched scaling, from both intervals of a contrast."""
    low, high = found["low"], found["high"]
    seeds = found["seeds"]
    if seeds["low"] is not None:
        low, high = min(low, seeds["low"]), max(high, seeds["high"])
    numbers = (
        f"{found['value']:+.4f}, 95 % over questions {found['low']:+.4f} to {found['high']:+.4f}"
    )
    if seeds["low"] is not None:
        numbers += f", over {seeds['num_seeds']} seeds {seeds['low']:+.4f} to {seeds['high']:+.4f}"
    if low > 0:
        return {"status": "good", "sentence": f"Restoration beats norm-matched scaling: {numbers}."}
    if high < 0:
        sentence = f"Restoration is worse than norm-matched scaling: {numbers}."
        return {"status": "bad", "sentence": sentence}
    sentence = f"Restoration does not beat norm-matched scaling: {numbers}; an interval includes 0."
    return {"status": "open", "sentence": sentence}


def read_runs(runs: Sequence[Run]) -> list[Answered]:
    """Read the selections of all runs.

    Raises:
        DataError: There are none, or one is missing.
    """
    if not runs:
        raise DataError("no run of the study has enough facts to tune on; nothing to report.")
    found = []
    for run in runs:
        path = run.sweep / SELECTION_NAME
        if not path.is_file():
            raise DataError(f"{path} is missing; start the same command again.")
        found.append(Answered(run, json.loads(path.read_bytes())))
    return found


def _cell(runs: Sequence[Answered]) -> dict[str, Any]:
    """Return the means of runs of one group and setting."""
    families = runs[0].families

    def mean(name: Any, kind: str) -> float:
        return fmean(run.accuracy(name(run), kind) for run in runs)

    models: dict[str, Any] = {SOURCE: lambda run: SOURCE, TUNED: lambda run: TUNED}
    models |= {family: lambda run, family=family: run.chosen(family) for family in families}
    return {
        "seeds": sorted(run.run.seed for run in runs),
        "facts": [run.run.facts for run in runs],
        "fractions": [run.data["chosen"][RESTORED]["fraction"] for run in runs],
        "accuracy": {
            name: {kind: mean(model, kind) for kind in (TEST, EITHER, OTHER)}
            for name, model in models.items()
        },
        "trained": {
            name: fmean(run.trained(model(run)) for run in runs) for name, model in models.items()
        },
    }


def _by_mastery(runs: Sequence[Answered]) -> dict[str, Any]:
    """Return accuracy on untouched facts by their mastery group, of the models picked."""
    models: dict[str, Any] = {SOURCE: lambda run: SOURCE, TUNED: lambda run: TUNED}
    models |= {f: lambda run, f=f: run.chosen(f) for f in (RESTORED, SCALED)}
    found: dict[str, Any] = {}
    for name, model in models.items():
        kind = EITHER if name == SOURCE else TEST
        rows: dict[int, list[float]] = {}
        for run in runs:
            for group, values in run.values(model(run), kind).items():
                rows.setdefault(group, []).append(float(values.mean()))
        found[name] = {str(group): fmean(values) for group, values in sorted(rows.items())}
    return found


def _curves(runs: Sequence[Answered]) -> dict[str, Any]:
    """Return kind of edit -> accuracy by fraction, means over runs."""
    start = {kind: fmean(run.accuracy(TUNED, kind) for run in runs) for kind in (TEST, EITHER)}
    found: dict[str, Any] = {}
    for family in runs[0].families:
        rows = [{"fraction": 0.0, **start}]
        for fraction in runs[0].fractions:
            values = {
                kind: fmean(run.accuracy(run.at(family, fraction), kind) for run in runs)
                for kind in (TEST, EITHER)
            }
            rows.append({"fraction": fraction, **values})
        found[family] = rows
    return found


def _sizes(facts: Mapping[int, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Return facts by mastery group for every seed: all, to tune on, and by exposures."""
    rows = []
    for seed, own in facts.items():
        exposures = sorted({fact["exposures"] for fact in own})
        rows.append(
            {
                "seed": seed,
                "all": [sum(f["group"] == g for f in own) for g in range(GROUPS)],
                "train": [
                    sum(f["group"] == g and f["split"] == "train" for f in own)
                    for g in range(GROUPS)
                ],
                "by_exposures": {
                    str(n): [
                        sum(f["group"] == g and f["exposures"] == n for f in own)
                        for g in range(GROUPS)
                    ]
                    for n in exposures
                },
            }
        )
    return rows


def study_data(
    runs: Sequence[Answered], facts: Mapping[int, Sequence[Mapping[str, Any]]]
) -> dict[str, Any]:
    """Return everything the report shows.

    Args:
        runs: Runs of one study.
        facts: Seed -> facts of its world with their mastery group.
    """
    settings = list(dict.fromkeys(run.run.setting for run in runs))
    groups = sorted({run.run.group for run in runs})

    def of(setting: str, group: int | None = None) -> list[Answered]:
        return [
            run for run in runs if run.run.setting == setting and group in (None, run.run.group)
        ]

    main = contrasts(runs)
    return {
        "title": "What tuning does to knowledge, and what restoration undoes",
        "seeds": sorted({run.run.seed for run in runs}),
        "runs": len(runs),
        "verdict": verdict(main["own_best"][SCALED]),
        "equal_distance": verdict(main["equal_fraction"][SCALED]),
        "contrasts": {"all runs": main} | {name: contrasts(of(name)) for name in settings},
        "contrasts_either": contrasts(runs, EITHER),
        "contrasts_other": contrasts(runs, OTHER),
        "cells": [
            {"setting": name, "group": group, **_cell(of(name, group))}
            for name in settings
            for group in groups
            if of(name, group)
        ],
        "by_mastery": {name: _by_mastery(of(name)) for name in settings},
        "curves": {name: _curves(of(name)) for name in settings},
        "sizes": _sizes(facts),
        "list": [
            {name: str(value) if isinstance(value, Path) else value
             for name, value in asdict(run.run).items()}
            | {"chosen": run.data["chosen"]}
            for run in runs
        ],
        "made_by": provenance(),
    }  # fmt: skip


def build_study_report(
    runs: Sequence[Run], facts: Mapping[int, Sequence[Mapping[str, Any]]], folder: Path
) -> Path:
    """Write ``report.json`` and ``report.html``; return the page.

    Args:
        runs: Finished runs.
        facts: Seed -> facts with their mastery group.
        folder: Folder of the report; made if missing.

    Raises:
        DataError: A run is not finished.
        ConfigError: matplotlib is not installed.
    """
    require_matplotlib()
    data = study_data(read_runs(runs), facts)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / JSON_NAME, data)
    path = folder / HTML_NAME
    path.write_text(render(data), encoding="utf-8")
    return path

"""Entropy-probability landscape of a data set: which targets fight what a model is sure of.

Every target of the rows that are looked at is passed through one or more models (before and after
training, for instance). The result is a page and a JSON file with the same numbers.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int

from forgetscale.analysis.landscape_numbers import (
    QUADRANTS,
    SURE_ENTROPY,
    UNLIKELY,
    Borders,
    by_group,
    summary,
    transitions,
)
from forgetscale.analysis.landscape_page import render
from forgetscale.analysis.landscape_texts import Place, conflict_tokens, fighting_texts
from forgetscale.analysis.passes import Seen, Span, walk
from forgetscale.artifact import provenance, write_json
from forgetscale.config import EaftLossConfig, Recipe, recipe_dict
from forgetscale.data import TrainingData, calibration_rows, open_data, require_vocabulary
from forgetscale.engine import RunLog, open_source
from forgetscale.engine.start import start_engine
from forgetscale.errors import ConfigError, DataError
from forgetscale.evaluation.report.drawing import require_matplotlib
from forgetscale.models import load_tokenizer
from forgetscale.ops.observe import landscape_observer
from forgetscale.progress import Progress
from forgetscale.zero3 import World

SUMMARY = "see which samples fight what the model is sure of"
JSON_FILE, PAGE_FILE = "landscape.json", "landscape.html"
EXPORT_FOLDER = "export"
_ROWS_A_SPAN = 32
_TOP_K = 20
NOTED = ("log_prob", "entropy", "top_entropy", "gradient", "best", "best_log_prob")


def add_arguments(parser: Any) -> None:
    """Add the options of this analysis."""
    parser.add_argument(
        "--models",
        nargs="+",
        metavar="NAME=DIR",
        help="models to look through, the first is the one conflicts are ranked by (default:"
        " source=model.path and, if the run has an export, after=run.output_dir/export)",
    )
    parser.add_argument(
        "--max-rows",
        type=int,
        default=2000,
        metavar="N",
        help="rows of each set, at equal strides (default: %(default)s)",
    )
    parser.add_argument(
        "--sure-entropy",
        type=float,
        default=SURE_ENTROPY,
        metavar="NATS",
        help="entropy up to which the model is sure (default: %(default)s)",
    )
    parser.add_argument(
        "--unlikely",
        type=float,
        default=UNLIKELY,
        metavar="P",
        help="probability up to which a target is unlikely (default: %(default)s)",
    )
    parser.add_argument(
        "--list",
        type=int,
        default=20,
        metavar="N",
        help="samples and tokens named (default: %(default)s)",
    )


def output_of(options: argparse.Namespace, recipe: Recipe) -> Path:
    """Return the folder that is written.

    Raises:
        ConfigError: The command names none.
    """
    if options.output is None:
        raise ConfigError("--landscape needs --output, the folder of the page.")
    return Path(options.output)


def run(options: argparse.Namespace, recipe: Recipe, world: World, log: RunLog) -> None:
    """Write the page and its numbers. Collective: every rank must call it.

    Raises:
        ConfigError: An option is out of range, or a model is named wrongly.
        DataError: A model or the data are missing or damaged, or do not go together.
    """
    require_matplotlib()
    borders = _check(options)
    models = models_of(recipe, options.models)
    data = open_data(recipe.data, recipe.model.path)
    spans = spans_of(data, options.max_rows)
    looks = [look(recipe, world, log, data, spans, name, path) for name, path in models]
    output = output_of(options, recipe)

    def write() -> str:
        found = describe(recipe, data, spans, looks, borders, options.list)
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / JSON_FILE, found)
        page = output / PAGE_FILE
        part = page.with_name(f".{page.name}.tmp")
        part.write_text(render(found), encoding="utf-8")
        part.replace(page)
        share = found["models"][0]["quadrants"]["conflict"]
        return (
            f"{share['tokens']:.2%} of {found['num_tokens']:,} targets conflict with what"
            f" {found['models'][0]['name']} is sure of, with {share['gradient']:.1%} of the"
            f" gradient; wrote {page}"
        )

    log(world.on_main(write))


def _check(options: argparse.Namespace) -> Borders:
    if options.max_rows < 1 or options.list < 1:
        raise ConfigError(
            f"--max-rows and --list must be >= 1, got {options.max_rows} and {options.list}."
        )
    if options.sure_entropy <= 0 or not 0 < options.unlikely < 1:
        raise ConfigError(
            "--sure-entropy must be > 0 and --unlikely in (0, 1), got"
            f" {options.sure_entropy} and {options.unlikely}."
        )
    return Borders(options.sure_entropy, options.unlikely)


def models_of(recipe: Recipe, named: Sequence[str] | None) -> list[tuple[str, Path]]:
    """Return names and folders of the models to look through.

    Args:
        recipe: Resolved recipe.
        named: ``NAME=DIR`` items; None for source and, if there is one, export of the run.

    Raises:
        ConfigError: An item has no ``=``, or two have the same name.
    """
    if named is None:
        export = recipe.run.output_dir / EXPORT_FOLDER
        after = [("after", export)] if export.is_dir() else []
        return [("source", recipe.model.path), *after]
    found = []
    for item in named:
        name, separator, path = item.partition("=")
        if not (name and separator and path):
            raise ConfigError(f"--models {item!r} is not of the form NAME=DIR.")
        found.append((name, Path(path)))
    if len({name for name, _ in found}) < len(found):
        raise ConfigError(f"--models names one model twice: {', '.join(named)}.")
    return found


def spans_of(data: TrainingData, max_rows: int) -> list[Span]:
    """Return the rows that are looked at, cut into spans for ranks to take.

    Args:
        data: The sets.
        max_rows: Rows of each set, > 0.
    """
    spans = []
    for index, part in enumerate(data.parts):
        rows = np.array(calibration_rows(part.token_set.num_rows, max_rows))
        spans += [
            Span(index, rows[first : first + _ROWS_A_SPAN])
            for first in range(0, len(rows), _ROWS_A_SPAN)
        ]
    return spans


@dataclass(frozen=True, slots=True)
class Look:
    """One model's view of all targets, in the order of the spans."""

    name: str
    path: Path
    model_hash: str
    vocab_size: int
    place: Place
    tokens: dict[str, np.ndarray]


def look(
    recipe: Recipe,
    world: World,
    log: RunLog,
    data: TrainingData,
    spans: Sequence[Span],
    name: str,
    path: Path,
) -> Look:
    """Pass the rows through one model. Collective: every rank must call it.

    Raises:
        DataError: The model or a row is missing or damaged, or no token is a target.
    """
    here = replace(recipe, model=replace(recipe.model, path=path))
    open_data(recipe.data, path)
    source = open_source(here, world)
    size = source.config.vocab_size
    for part in data.parts:
        require_vocabulary(part.token_set, size, path)
    loss = recipe.method.loss
    top_k = min(loss.top_k if isinstance(loss, EaftLossConfig) else _TOP_K, size)
    mine: dict[int, Seen] = {}
    engine = start_engine(here, world, source, plan=None, training=False)
    with Progress(
        sum(len(span.rows) for span in spans),
        f"look through {name}",
        unit="row",
        log_path=log.path,
        visible=log.visible,
    ) as progress:
        walk(engine, here, data, spans, landscape_observer(top_k), mine.__setitem__, progress)
    engine.destroy()
    seen = {number: item for part in world.gather_objects(mine) for number, item in part.items()}
    ordered = [seen[number] for number in range(len(spans))]
    tokens = {
        column: torch.cat([item.columns[column] for item in ordered]).numpy() for column in NOTED
    }
    if not len(tokens["log_prob"]):
        raise DataError("no token of these rows is a target; look at other rows.")
    if not np.isfinite(tokens["log_prob"]).all():
        raise DataError(f"what {path} predicts is not finite in some row; check the model.")
    tokens["gate"] = np.clip(tokens["top_entropy"] / math.log(top_k), 0, None)
    place = Place(
        set_id=np.concatenate(
            [np.full(len(item.row), spans[n].set_index) for n, item in enumerate(ordered)]
        ),
        row=np.concatenate([spans[n].rows[item.row.numpy()] for n, item in enumerate(ordered)]),
        token=torch.cat([item.place for item in ordered]).numpy(),
        label=torch.cat([item.label for item in ordered]).numpy(),
    )
    return Look(name, path, source.content_hash, size, place, tokens)


def describe(
    recipe: Recipe,
    data: TrainingData,
    spans: Sequence[Span],
    looks: Sequence[Look],
    borders: Borders,
    count: int,
) -> dict[str, Any]:
    """Return everything the page shows.

    Args:
        recipe: Resolved recipe.
        data: The sets.
        spans: Rows that were looked at.
        looks: At least one; the first ranks samples and tokens.
        borders: Where quadrants meet.
        count: Samples and tokens to name.
    """
    tokenizer = load_tokenizer(recipe.model.path)
    first, last = looks[0], looks[-1]
    texts = first.place.texts(data)
    views = [(item.name, item.tokens) for item in looks]
    return {
        "title": f"Landscape of {', '.join(part.name for part in data.parts)}",
        "num_tokens": len(first.tokens["log_prob"]),
        "num_texts": len(texts.names),
        "num_rows": sum(len(span.rows) for span in spans),
        "num_rows_in_all": data.num_rows,
        "vocab_size": first.vocab_size,
        "borders": {"entropy": borders.entropy, "probability": borders.probability},
        "models": [
            {"name": item.name, "path": str(item.path), "model_hash": item.model_hash}
            | summary(item.tokens, borders, item.vocab_size)
            for item in looks
        ],
        "quadrants": list(QUADRANTS),
        "transitions": transitions(first.tokens, last.tokens, borders) if last != first else None,
        "sources": _sources(looks, texts.source, texts.sources, borders),
        "texts": fighting_texts(data, tokenizer, first.place, texts, views, borders, count),
        "tokens": conflict_tokens(data, tokenizer, first.place, texts, views, borders, count),
        "data": {part.name: part.token_set.content_hash for part in data.parts},
        "made_by": provenance(recipe_dict(recipe)),
    }


def _sources(
    looks: Sequence[Look], source: Int[np.ndarray, " M"], names: Sequence[str], borders: Borders
) -> list[dict[str, Any]]:
    views = {item.name: by_group(item.tokens, source, len(names), borders) for item in looks}
    found = [
        {"name": name, "models": {view: groups[index] for view, groups in views.items()}}
        for index, name in enumerate(names)
    ]
    first = looks[0].name
    return sorted(
        found,
        key=lambda item: -item["models"][first]["conflicts"] / item["models"][first]["tokens"],
    )

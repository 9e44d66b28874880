"""Run the statistics of a change over two models and put the results together."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from forgetscale.artifact import provenance, write_json
from forgetscale.errors import DataError
from forgetscale.knowledge.counting import Arrays
from forgetscale.knowledge.delta import (
    MEASURES,
    SCALARS,
    GroupTables,
    delta_part,
    exact_shares,
    join_scalars,
    null_part,
    refine_delta,
    shares,
    taken_share,
    verdict,
)
from forgetscale.knowledge.delta_page import render
from forgetscale.knowledge.edits import decimal
from forgetscale.knowledge.restore import Place
from forgetscale.knowledge.setup import Request, Setup, cached_setup, forget_setup, open_setup
from forgetscale.knowledge.work import Crew, Results, until_published
from forgetscale.masks.radix import locate

JSON_NAME, HTML_NAME = "delta.json", "delta.html"


def delta_stage(part: int, request: Request) -> Arrays:
    """``delta_part`` in any process."""
    return delta_part(cached_setup(request), part)


def refine_stage(part: int, request: Request, bins: Sequence[int]) -> Arrays:
    """``refine_delta`` in any process."""
    return refine_delta(cached_setup(request), part, bins)


def null_stage(
    part: int, request: Request, sizes: dict[str, float], every: int, seed: int
) -> Arrays:
    """``null_part`` in any process."""
    return null_part(cached_setup(request), part, sizes, every, seed)


def _row(fraction: Fraction, count: int, values: Sequence[float]) -> dict[str, Any]:
    named = dict(zip(MEASURES, values, strict=True))
    return {"fraction": float(fraction), "count": count, **named}


def _scalars(values: np.ndarray, sums: np.ndarray) -> dict[str, float]:
    named = dict(zip(SCALARS, (float(value) for value in values), strict=True))
    size, norm = named["elements"], math.sqrt(named["source_sq"] * named["tuned_sq"])
    return {
        "elements": int(size),
        "unchanged": named["unchanged"] / size,
        "flipped": named["flipped"] / size,
        "mean_r": float(sums[1]) / size,
        "max_r": named["max_r"],
        "mean_abs": float(sums[2]) / size,
        "norm": math.sqrt(float(sums[3])),
        "relative_norm": math.sqrt(float(sums[3]) / named["source_sq"])
        if named["source_sq"]
        else math.inf,
        "cosine": named["product"] / norm if norm else 0.0,
        **{name: float(value) for name, value in zip(MEASURES, sums[1:], strict=True)},
    }


def _groups(
    setup: Setup,
    results: Results,
    fractions: Sequence[Fraction],
    scalars: dict[tuple[str, str], np.ndarray] | None,
) -> tuple[np.ndarray, dict[tuple[str, str], dict[str, Any]]]:
    """Return the whole model's table, and rows by (scope, group)."""
    found: dict[tuple[str, str], dict[str, Any]] = {}

    def close(scope: str, group: str, table: np.ndarray) -> None:
        size = float(table[0].sum())
        row: dict[str, Any] = {
            "shares": [
                _row(f, math.floor(f * int(size)), shares(table, math.floor(f * int(size))))
                for f in fractions
            ]
        }
        if scalars is not None:
            row |= _scalars(scalars[scope, group], table.sum(1))
        found[scope, group] = row

    return GroupTables(setup, close).run(results), found


def _enrichment(
    setup: Setup,
    results: Results,
    whole: np.ndarray,
    fraction: Fraction,
) -> dict[tuple[str, str], float]:
    """Return, by group, its share of the model's top fraction over its share of the elements."""
    size = int(whole[0].sum())
    place = locate(whole[0].astype(np.int64), math.floor(fraction * size), "top")
    found: dict[tuple[str, str], float] = {}
    if place is None:
        return found
    part = place.take / float(whole[0, place.bin])

    def close(scope: str, group: str, table: np.ndarray) -> None:
        found[scope, group] = taken_share(table, place.bin, part) / float(fraction)

    GroupTables(setup, close).run(results)
    return found


def analyse_delta(
    request: Request,
    place: Place,
    log: Callable[[str], None],
    *,
    null_elements: int,
    null_seed: int = 0,
) -> Path:
    """Write ``delta.json`` and ``delta.html`` about what tuning changed.

    Args:
        request: Models, region, fractions (ascending) and eps.
        place: Output folder and processes.
        log: Receives one line per event.
        null_elements: Most elements the null model draws.
        null_seed: Of the null model.

    Returns:
        Path of the page.

    Raises:
        DataError: An input cannot be used, or the output exists.
    """
    forget_setup()
    setup = open_setup(request)
    page = place.output / HTML_NAME
    if page.exists() or place.output.is_file():
        raise DataError(f"{place.output} exists already; name another --output or remove it.")
    digest = request.digest()
    work = place.output.with_name(f".{place.output.name}.work-{digest[:12]}")
    data: dict[str, Any] = {}
    with (
        until_published(page, place.rank),
        Crew(work, place.rank, place.size, place.workers, place.visible) as crew,
    ):
        data = _collect(request, setup, crew, null_elements, null_seed)
        if place.rank == 0:
            place.output.mkdir(parents=True, exist_ok=True)
            write_json(place.output / JSON_NAME, data)
            temporary = page.with_suffix(".tmp")
            temporary.write_text(render(data), encoding="utf-8")
            temporary.replace(page)
    if place.rank == 0:
        shutil.rmtree(work)
        log(data["verdict"]["sentence"])
    return page


def _collect(
    request: Request, setup: Setup, crew: Crew, null_elements: int, null_seed: int
) -> dict[str, Any]:
    fractions, parts = request.options.fractions, len(setup.parts)
    counted = crew.run("delta", delta_stage, parts, (request,))
    scalars = join_scalars(setup, counted)
    whole, groups = _groups(setup, counted, fractions, scalars)
    size = int(whole[0].sum())
    counts = [math.floor(fraction * size) for fraction in fractions]
    places = [locate(whole[0].astype(np.int64), count, "top") for count in counts]
    bins = sorted({found.bin for found in places if found})
    refined = crew.run("refine", refine_stage, parts, (request, bins))
    found = exact_shares(whole, counts, refined)
    sizes = {
        group: row["norm"] / math.sqrt(row["elements"])
        for (scope, group), row in groups.items()
        if scope == "tensor"
    }
    every = max(1, -(-size // null_elements))
    drawn = crew.run("null", null_stage, parts, (request, sizes, every, null_seed))
    null_whole, null_groups = _groups(setup, drawn, fractions, None)
    null = [shares(null_whole, math.floor(f * int(null_whole[0].sum()))) for f in fractions]
    shown = next((f for f in fractions if float(f) >= 0.2), fractions[-1])
    rich = _enrichment(setup, counted, whole, shown)
    null_rich = _enrichment(setup, drawn, null_whole, shown)
    return {
        "title": "What tuning changed",
        "source": str(request.source),
        "tuned": str(request.tuned[0]),
        "region": {"include": setup.region.include, "exclude": setup.region.exclude},
        "eps": request.options.eps,
        "score_dtype": "bfloat16" if request.options.narrow else "float32",
        "model": _scalars(scalars["global", "all"], whole.sum(1)),
        "shares": [_row(f, k, s) for f, k, s in zip(fractions, counts, found, strict=True)],
        "null": {
            "elements": int(null_whole[0].sum()) // every,
            "seed": null_seed,
            "shares": [_row(f, k, s) for f, k, s in zip(fractions, counts, null, strict=True)],
        },
        "verdict": verdict(found, null),
        "enrichment_fraction": decimal(shown),
        **{
            f"{scope}s": [
                {
                    "name": group,
                    **row,
                    "enrichment": rich.get((scope, group)),
                    "null_enrichment": null_rich.get((scope, group)),
                    "null_shares": null_groups.get((scope, group), {}).get("shares"),
                }
                for (at, group), row in groups.items()
                if at == scope
            ]
            for scope in ("tensor", "layer", "module")
        },
        "made_by": provenance(),
    }

"""How well a model knows facts: templates x samples for each, and the group of the hit rate.

Beside the groups stand two measures that tell "does not know" from "does not answer": how many
continuations follow the answer's format, and where the right answer ranks by likelihood, for which
nothing has to be written.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from forgetscale.artifact import ArtifactWriter, canonical_json, hash_bytes, write_json
from forgetscale.errors import DataError
from forgetscale.evaluation.model import LoadedModel, hash_model, load_model
from forgetscale.generation.loading import default_device
from forgetscale.generation.store import RunStore
from forgetscale.knowledge.continuations import (
    Continuation,
    Drawing,
    draw_all,
    ids_per_fact,
    open_store,
    openings,
    read_continuations,
)
from forgetscale.knowledge.facts import IN_DOMAIN, Fact, Rule, follows_format, holds_answer
from forgetscale.knowledge.ranks import MEASURES, rank_facts, relation_objects, summarise_ranks
from forgetscale.knowledge.restore import Place
from forgetscale.knowledge.work import Crew, until_published
from forgetscale.ops.knowledge import GROUPS, mastery_group
from forgetscale.progress import Progress

KIND = "mastery"
FACTS_NAME, SUMMARY_NAME = "facts.jsonl", "mastery.json"
_RANKED_TEXTS = 64
"""Texts of a forward call; a constant, because ranks may hang on rounding."""
_LOADED: dict[tuple[Path, str], LoadedModel] = {}


@dataclass(frozen=True, slots=True)
class Probe:
    """What is asked, and how; everything that decides the result but the number of slots.

    Args:
        model: Model folder.
        num_samples: Continuations of each opening, >= 1 (paper: 10).
        max_new_tokens: Longest continuation (paper: 32).
        temperature: Of sampling, > 0 (paper: 0.7).
        rule: See ``holds_answer``.
        fold_case: See ``holds_answer``.
        seed: Of sampling.
        part: Facts of one resumable part of the ranks.
        batch_size: Openings continued together, >= 1 (at least 4 are); in fp32 on a CPU nothing
            depends on it.
        dtype: ``auto``, ``float32`` or ``bfloat16``.
        stop_newline: A line break ends a continuation; saves what nobody reads.
        rank_candidates: Answers among which the right one is ranked, >= 2; 0 ranks nothing.
    """

    model: Path
    num_samples: int = 10
    max_new_tokens: int = 32
    temperature: float = 0.7
    rule: Rule = "words"
    fold_case: bool = True
    seed: int = 0
    part: int = 16
    batch_size: int = 16
    dtype: str = "auto"
    stop_newline: bool = False
    rank_candidates: int = 32

    @property
    def drawing(self) -> Drawing:
        """How continuations are drawn."""
        return Drawing(
            self.num_samples, self.max_new_tokens, self.temperature, self.seed, self.stop_newline
        )


def _model(probe: Probe) -> LoadedModel:
    key = (probe.model, probe.dtype)
    if key not in _LOADED:
        _LOADED.clear()
        _LOADED[key] = load_model(probe.model, dtype=probe.dtype, device=default_device())
    return _LOADED[key]


def sample_stage(
    probe: Probe,
    facts: Sequence[Fact],
    templates: Mapping[str, Sequence[str]],
    folder: Path,
    digest: str,
    *,
    visible: bool,
) -> None:
    """Draw continuations until all are there, in any process."""
    total = sum(ids_per_fact(facts, templates, probe.num_samples))
    store = open_store(folder, digest, total)
    with Progress(total, "mastery", unit="sample", visible=visible) as progress:
        draw_all(
            _model(probe),
            probe.model,
            probe.drawing,
            facts,
            templates,
            store,
            num_slots=probe.batch_size,
            report=lambda done, total, note: progress.update(done),
        )


def rank_part(
    part: int,
    probe: Probe,
    facts: Sequence[Fact],
    templates: Mapping[str, Sequence[str]],
    objects: Mapping[str, Sequence[str]],
) -> dict[str, np.ndarray]:
    """Rank the right answers of one part's facts."""
    own = facts[part * probe.part : (part + 1) * probe.part]
    rows = rank_facts(
        _model(probe),
        probe.model,
        own,
        templates,
        objects,
        candidates=probe.rank_candidates,
        batch_size=_RANKED_TEXTS,
    )
    return {"rows": np.frombuffer(json.dumps(rows).encode(), np.uint8)}


def grade(
    fact: Fact, asked: Sequence[str], found: Sequence[Sequence[Continuation]], probe: Probe
) -> dict[str, Any]:
    """Return hits and answers in the format, by opening, their sums, and the group of one fact.

    Args:
        fact: What was asked for.
        asked: Its openings.
        found: For each opening, what was written.
        probe: The rules.
    """
    hits, followed, both = [], [], 0
    for opening, samples in zip(asked, found, strict=True):
        right = [
            holds_answer(item.text, fact.answers, rule=probe.rule, fold_case=probe.fold_case)
            for item in samples
        ]
        formed = [
            follows_format(item.text, opening, fact.subject, stopped=item.stopped)
            for item in samples
        ]
        hits.append(sum(right))
        followed.append(sum(formed))
        both += sum(a and b for a, b in zip(right, formed, strict=True))
    total = sum(len(samples) for samples in found)
    return {
        "id": fact.id,
        "subject": fact.subject,
        "relation": fact.relation,
        "object": fact.answers[0],
        "hits": hits,
        "hit_count": sum(hits),
        "total": total,
        "group": mastery_group(sum(hits), total),
        "followed": followed,
        "follow_count": sum(followed),
        "follow_hit_count": both,
    }


def summarise(rows: Sequence[Mapping[str, Any]], in_domain: Sequence[str]) -> dict[str, Any]:
    """Count groups and average rates, of all facts, by domain and by relation.

    ``macro`` is the mean over relations of their mean rate, ``micro`` the mean over facts.
    ``format_following`` is the same for the share of continuations that follow the format, and by
    mastery group (None for a group without facts); ``hit_rate_in_format`` is the share of hits
    among those alone (None where there are none). Ranks are over openings, where there are any.
    """

    def of(own: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        by_group = [[row for row in own if row["group"] == group] for group in range(GROUPS)]
        micro, macro = _averages(own, "hit_count")
        formed = _averages(own, "follow_count")
        answered = sum(row["follow_count"] for row in own)
        right = sum(row["follow_hit_count"] for row in own)
        found: dict[str, Any] = {
            "facts": len(own),
            "groups": [len(rows) for rows in by_group],
            "micro": micro,
            "macro": macro,
            "format_following": {
                "micro": formed[0],
                "macro": formed[1],
                "by_group": [_averages(r, "follow_count")[0] if r else None for r in by_group],
            },
            "hit_rate_in_format": right / answered if answered else None,
        }
        if all(MEASURES[0] in row for row in own):
            groups = [summarise_ranks(rows) if rows else None for rows in by_group]
            found["ranks"] = summarise_ranks(own) | {"by_group": groups}
        return found

    inside = [row for row in rows if row["relation"] in in_domain]
    outside = [row for row in rows if row["relation"] not in in_domain]
    relations = sorted({row["relation"] for row in rows})
    found: dict[str, Any] = {"all": of(rows)}
    if inside and outside:
        found |= {"in_domain": of(inside), "out_of_domain": of(outside)}
    found["relations"] = {
        name: {"domain": "in" if name in in_domain else "out"}
        | of([row for row in rows if row["relation"] == name])
        for name in relations
    }
    return found


def _averages(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[float, float]:
    """Return the mean of a rate over facts, and over relations."""
    rates: dict[str, list[float]] = {}
    for row in rows:
        rates.setdefault(row["relation"], []).append(row[name] / row["total"])
    means = [sum(values) / len(values) for values in rates.values()]
    return sum(map(sum, rates.values())) / len(rows), sum(means) / len(means)


def probe_mastery(
    probe: Probe,
    facts: Sequence[Fact],
    templates: Mapping[str, Sequence[str]],
    place: Place,
    in_domain: Sequence[str] = IN_DOMAIN,
) -> dict[str, Any]:
    """Sample, grade, and publish ``facts.jsonl`` and ``mastery.json``.

    Continuations come from the generator's engine and workers, so a probe goes on where it was
    stopped, continuation by continuation, and in fp32 on a CPU the result is the same for any
    number of processes. Every rank must call it alike; one alone is enough.

    Args:
        probe: What is asked.
        facts: In the order of the result.
        templates: Relation -> openings.
        place: Output folder and processes; each process holds a whole model.
        in_domain: Relations counted as in-domain.

    Raises:
        ConfigError: The generator's engine cannot run the model.
        DataError: The output exists, ids repeat, or the model cannot be used.
    """
    if len({fact.id for fact in facts}) != len(facts):
        raise DataError("two facts have one id; give each its own.")
    if place.output.exists():
        raise DataError(f"{place.output} exists already; name another --output or remove it.")
    model = hash_model(probe.model)
    asked = {name: str(value) for name, value in asdict(probe).items() if name != "batch_size"}
    digest = hash_bytes(
        canonical_json([asked, model, [asdict(fact) for fact in facts], dict(templates)])
    )
    work = place.output.with_name(f".{place.output.name}.work-{digest[:12]}")
    given = (probe, facts, templates)
    summary: dict[str, Any] = {}
    with (
        until_published(place.output, place.rank),
        Crew(work, place.rank, place.size, place.workers, place.visible) as crew,
    ):
        crew.everyone(sample_stage, (*given, work / "samples", digest))
        ranks: list[dict[str, Any]] = [{} for _ in facts]
        if probe.rank_candidates:
            count = -(-len(facts) // probe.part)
            objects = relation_objects(facts)
            results = crew.run("rank", rank_part, count, (*given, objects))
            ranks = [row for arrays in results for row in json.loads(arrays["rows"].tobytes())]
        if place.rank == 0:
            with ArtifactWriter(place.output, KIND) as artifact:
                artifact.inputs = {"model": model}
                artifact.payload = {"probe": asked | {"batch_size": str(probe.batch_size)}}
                store = open_store(
                    work / "samples", digest, sum(ids_per_fact(facts, templates, probe.num_samples))
                )
                rows = _write_facts(artifact.path / FACTS_NAME, store, given, ranks)
                summary = summarise(rows, in_domain)
                write_json(artifact.path / SUMMARY_NAME, summary)
    if place.rank == 0:
        shutil.rmtree(work)
    return summary


def _write_facts(
    path: Path,
    store: RunStore,
    given: tuple[Probe, Sequence[Fact], Mapping[str, Sequence[str]]],
    ranks: Sequence[dict[str, Any]],
) -> list[dict[str, Any]]:
    """Grade fact by fact and write each with its texts; return the rows without them."""
    probe, facts, templates = given
    rows = []
    found = read_continuations(store, facts, templates, probe.drawing)
    with path.open("w", encoding="utf-8") as file:
        for fact, samples, rank in zip(facts, found, ranks, strict=True):
            rows.append(grade(fact, openings(fact, templates), samples, probe) | rank)
            kept = {
                "texts": [[item.text for item in own] for own in samples],
                "stopped": [[item.stopped for item in own] for own in samples],
            }
            file.write(json.dumps(rows[-1] | kept, ensure_ascii=False) + "\n")
    return rows

"""How well a model knows facts: templates x samples for each, and the group of the hit rate."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from forgetscale.artifact import ArtifactWriter, canonical_json, hash_bytes, write_json
from forgetscale.errors import DataError
from forgetscale.evaluation.decoding import Decoding
from forgetscale.evaluation.generate import generation_config
from forgetscale.evaluation.model import LoadedModel, hash_model, load_model
from forgetscale.knowledge.facts import IN_DOMAIN, SUBJECT, Fact, Rule, holds_answer
from forgetscale.knowledge.restore import Place
from forgetscale.knowledge.work import Crew, Results
from forgetscale.ops.knowledge import GROUPS, mastery_group

KIND = "mastery"
FACTS_NAME, SUMMARY_NAME = "facts.jsonl", "mastery.json"
_LOADED: dict[Path, LoadedModel] = {}


@dataclass(frozen=True, slots=True)
class Probe:
    """What is asked, and how; everything that decides the result.

    Args:
        model: Model folder.
        num_samples: Continuations of each opening, >= 1 (paper: 10).
        max_new_tokens: Longest continuation (paper: 32).
        temperature: Of sampling, > 0 (paper: 0.7).
        rule: See ``holds_answer``.
        fold_case: See ``holds_answer``.
        seed: Of sampling.
        part: Facts of one resumable part.
        batch_size: Openings continued together; it enters the draws.
        dtype: ``auto``, ``float32`` or ``bfloat16``.
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


def openings(fact: Fact, templates: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the texts whose continuation should be the object."""
    return [text.replace(SUBJECT, fact.subject) for text in templates[fact.relation]]


def _model(probe: Probe) -> LoadedModel:
    if probe.model not in _LOADED:
        _LOADED.clear()
        _LOADED[probe.model] = load_model(probe.model, dtype=probe.dtype)
    return _LOADED[probe.model]


@torch.no_grad()
def continue_texts(
    loaded: LoadedModel, texts: Sequence[str], probe: Probe, seed: int
) -> list[list[str]]:
    """Sample ``num_samples`` continuations of each text; the draws belong to ``seed`` alone."""
    tokenizer, model = loaded.tokenizer, loaded.model
    rows = [tokenizer(text)["input_ids"] for text in texts]
    ends = loaded.stop_ids
    rows = [row[:-1] if row and row[-1] in ends else row for row in rows]
    longest = max(len(row) for row in rows)
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and longest + probe.max_new_tokens > limit:
        raise DataError(
            f"an opening has {longest} tokens and {probe.max_new_tokens} may follow, but"
            f" {probe.model} has {limit} positions; shorten the template or --max-new-tokens."
        )
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends or [0])[0]
    config = generation_config(
        Decoding(temperature=probe.temperature),
        max_new_tokens=probe.max_new_tokens,
        stop_ids=ends,
        pad_id=pad,
    )
    config.num_return_sequences = probe.num_samples
    ids = torch.full((len(rows), longest), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, longest - len(row) :] = torch.tensor(row, dtype=torch.int64)
        mask[index, longest - len(row) :] = 1
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        whole = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=config,
        )
    new = tokenizer.batch_decode(whole[:, longest:], skip_special_tokens=True)
    return [new[i * probe.num_samples : (i + 1) * probe.num_samples] for i in range(len(rows))]


def mastery_part(
    part: int, probe: Probe, facts: Sequence[Fact], templates: Mapping[str, Sequence[str]]
) -> dict[str, np.ndarray]:
    """Continue all openings of one part's facts; keep the texts, so that they can be regraded."""
    loaded = _model(probe)
    own = facts[part * probe.part : (part + 1) * probe.part]
    asked = [(fact, text) for fact in own for text in openings(fact, templates)]
    texts: list[list[str]] = []
    for number in range(0, len(asked), probe.batch_size):
        batch = [text for _, text in asked[number : number + probe.batch_size]]
        seed = int(np.random.SeedSequence([probe.seed, part, number]).generate_state(1)[0])
        texts += continue_texts(loaded, batch, probe, seed)
    by_fact: list[list[list[str]]] = [[] for _ in own]
    place = {fact.id: index for index, fact in enumerate(own)}
    for (fact, _), samples in zip(asked, texts, strict=True):
        by_fact[place[fact.id]].append(samples)
    data = json.dumps(by_fact, ensure_ascii=False).encode()
    return {"texts": np.frombuffer(data, np.uint8)}


def grade(fact: Fact, texts: Sequence[Sequence[str]], probe: Probe) -> dict[str, Any]:
    """Return hits by template, their sum, the rate and the group of one fact."""
    hits = [
        sum(
            holds_answer(text, fact.answers, rule=probe.rule, fold_case=probe.fold_case)
            for text in samples
        )
        for samples in texts
    ]
    total = sum(len(samples) for samples in texts)
    return {
        "id": fact.id,
        "subject": fact.subject,
        "relation": fact.relation,
        "object": fact.answers[0],
        "hits": hits,
        "hit_count": sum(hits),
        "total": total,
        "group": mastery_group(sum(hits), total),
    }


def summarise(rows: Sequence[Mapping[str, Any]], in_domain: Sequence[str]) -> dict[str, Any]:
    """Count groups and average hit rates, of all facts, by domain and by relation.

    ``macro`` is the mean over relations of their mean rate, ``micro`` the mean over facts.
    """

    def of(own: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        groups = [sum(row["group"] == group for row in own) for group in range(GROUPS)]
        rates: dict[str, list[float]] = {}
        for row in own:
            rates.setdefault(row["relation"], []).append(row["hit_count"] / row["total"])
        means = [sum(values) / len(values) for values in rates.values()]
        return {
            "facts": len(own),
            "groups": groups,
            "micro": sum(row["hit_count"] / row["total"] for row in own) / len(own),
            "macro": sum(means) / len(means),
        }

    inside = [row for row in rows if row["relation"] in in_domain]
    outside = [row for row in rows if row["relation"] not in in_domain]
    relations = sorted({row["relation"] for row in rows})
    found: dict[str, Any] = {"all": of(rows)}
    if inside and outside:
        found |= {"in_domain": of(inside), "out_of_domain": of(outside)}
    found["relations"] = {
        name: of([row for row in rows if row["relation"] == name]) for name in relations
    }
    return found


def probe_mastery(
    probe: Probe,
    facts: Sequence[Fact],
    templates: Mapping[str, Sequence[str]],
    place: Place,
    in_domain: Sequence[str] = IN_DOMAIN,
) -> dict[str, Any]:
    """Sample, grade, and publish ``facts.jsonl`` and ``mastery.json``.

    Resumes part by part. Every rank must call it alike; one alone is enough.

    Args:
        probe: What is asked.
        facts: In the order of the result.
        templates: Relation -> openings.
        place: Output folder and processes; each process holds a whole model.
        in_domain: Relations counted as in-domain.

    Raises:
        DataError: The output exists, ids repeat, or the model cannot be used.
    """
    if len({fact.id for fact in facts}) != len(facts):
        raise DataError("two facts have one id; give each its own.")
    if place.output.exists():
        raise DataError(f"{place.output} exists already; name another --output or remove it.")
    model = hash_model(probe.model)
    asked = {name: str(value) for name, value in asdict(probe).items()}
    digest = hash_bytes(
        canonical_json([asked, model, [asdict(fact) for fact in facts], dict(templates)])
    )
    work = place.output.with_name(f".{place.output.name}.work-{digest[:12]}")
    count = -(-len(facts) // probe.part)
    summary: dict[str, Any] = {}
    with Crew(work, place.rank, place.size, place.workers, place.visible) as crew:
        results = crew.run("mastery", mastery_part, count, (probe, facts, templates))
        if place.rank == 0:
            rows = _graded(results, facts, probe)
            summary = summarise(rows, in_domain)
            with ArtifactWriter(place.output, KIND) as artifact:
                artifact.inputs = {"model": model}
                artifact.payload = {"probe": asked}
                lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
                (artifact.path / FACTS_NAME).write_text("".join(lines), encoding="utf-8")
                write_json(artifact.path / SUMMARY_NAME, summary)
    if place.rank == 0:
        shutil.rmtree(work)
    return summary


def _graded(results: Results, facts: Sequence[Fact], probe: Probe) -> list[dict[str, Any]]:
    rows = []
    for part, arrays in enumerate(results):
        own = facts[part * probe.part : (part + 1) * probe.part]
        for fact, texts in zip(own, json.loads(arrays["texts"].tobytes()), strict=True):
            rows.append(grade(fact, texts, probe) | {"texts": texts})
    return rows

"""How far apart two models' next tokens are, after the same words or each after its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from forgetscale.artifact import ArtifactWriter, canonical_json, hash_bytes, write_json
from forgetscale.data import tokenizer_hash
from forgetscale.errors import DataError
from forgetscale.evaluation.bootstrap import bootstrap_mean, interval_seed
from forgetscale.evaluation.model import hash_model
from forgetscale.knowledge.kl_logits import (
    Holding,
    Memory,
    Question,
    agree_on_holding,
    choose_holding,
    resident_logits,
    streamed_logits,
)
from forgetscale.knowledge.restore import Place
from forgetscale.knowledge.work import Crew, until_published
from forgetscale.ops.knowledge import (
    Direction,
    TopOf,
    kl_divergence,
    top_ids,
    top_mass,
    topk_kl,
)

KIND = "token_kl"
MEASURES = ("topk_kl", "full_kl", "tuned_mass", "source_mass")
_LOGITS = {"resident": resident_logits, "stream": streamed_logits}


@dataclass(frozen=True, slots=True)
class Item:
    """One text whose continuation is compared."""

    id: str
    prompt: str
    """What the tuned model reads."""
    source_prompt: str
    """What the source model reads: the same, or its own wording."""
    answer: str
    """Text that is read on after the prompts, where all its tokens are compared."""
    group: str

    def in_one_context(self) -> Item:
        """Return the item with the tuned model's prompt for both."""
        return replace(self, source_prompt=self.prompt)


@dataclass(frozen=True, slots=True)
class Comparison:
    """What is compared; everything that decides the result.

    Args:
        source: Folder of the model before tuning.
        tuned: Folder of the tuned model.
        k: Tokens compared at each position.
        direction: See ``topk_kl``.
        top_of: See ``topk_kl``.
        all_tokens: Compare at every answer token, not only at the first.
        part: Items of one resumable part where models are held whole.
        dtype: ``auto``, ``float32`` or ``bfloat16``.
    """

    source: Path
    tuned: Path
    k: int = 10
    direction: Direction = "tuned_from_source"
    top_of: TopOf = "tuned"
    all_tokens: bool = False
    part: int = 64
    dtype: str = "auto"


def read_items(path: Path, *, need_answers: bool) -> list[Item]:
    """Read items from JSON lines: ``prompt``, optional ``source_prompt``, ``answer``, ``group``.

    Raises:
        DataError: The file is missing or a line is malformed; the message names it.
    """
    if not path.is_file():
        raise DataError(f"{path} does not exist; --prompts names a file of JSON lines.")
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            prompt, answer = str(row["prompt"]), str(row.get("answer", ""))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path}, line {number}: no object with a prompt ({error!r})."
            ) from error
        if not prompt or (need_answers and not answer):
            what = "prompt" if not prompt else "answer"
            raise DataError(f"{path}, line {number} has no {what}; every item needs one.")
        own = str(row.get("source_prompt", prompt))
        group = str(row.get("group", "all"))
        found.append(Item(str(row.get("id", number)), prompt, own, answer, group))
    if not found:
        raise DataError(f"{path} holds no items.")
    return found


def compare_logits(tuned: Tensor, source: Tensor, comparison: Comparison) -> np.ndarray:
    """Return ``[4]``: means over positions, in the order of ``MEASURES``."""
    ids = top_ids(tuned if comparison.top_of == "tuned" else source, comparison.k)
    rows = (
        topk_kl(
            tuned,
            source,
            comparison.k,
            direction=comparison.direction,
            top_of=comparison.top_of,
        ),
        kl_divergence(tuned, source, comparison.direction),
        top_mass(tuned, ids),
        top_mass(source, ids),
    )
    return np.array([float(row.double().mean()) for row in rows])


def token_kl_part(
    part: int, comparison: Comparison, items: Sequence[Item], holding: Holding
) -> dict[str, Any]:
    """Compare one part's items."""
    own = items[part * holding.part : (part + 1) * holding.part]
    answers = [item.answer if comparison.all_tokens else "" for item in own]
    asked = [
        (Question(item.prompt, answer), Question(item.source_prompt, answer))
        for item, answer in zip(own, answers, strict=True)
    ]
    rows = []
    logits_of = _LOGITS[holding.memory]
    for mine, theirs in logits_of((comparison.tuned, comparison.source), asked, comparison.dtype):
        if comparison.k > mine.shape[-1]:
            raise DataError(
                f"--kl-top-k {comparison.k} is above the vocabulary of {mine.shape[-1]}; lower it."
            )
        rows.append(compare_logits(mine, theirs, comparison))
    return {"values": np.stack(rows)}


def compare_tokens(
    comparison: Comparison,
    items: Sequence[Item],
    place: Place,
    *,
    memory: Memory = "auto",
    seed: int = 0,
    log: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Compare two models on all items; publish ``items.jsonl`` and ``token_kl.json``.

    Resumes part by part. Every rank must call it alike; one alone is enough. Each process holds
    both models, or one layer of one of them at a time; values agree to rounding.

    Args:
        comparison: What is compared.
        items: In the order of the result.
        place: Output folder and processes.
        memory: ``resident``, ``stream`` (layer by layer), or ``auto`` by the room there is.
        seed: Of the bootstrap.
        log: Receives a line that says how models are held.

    Raises:
        ConfigError: ``stream``, and an architecture is not known to run so.
        DataError: The models have other tokenizers, or the output exists.
    """
    if tokenizer_hash(comparison.source) != tokenizer_hash(comparison.tuned):
        raise DataError(
            f"{comparison.source} and {comparison.tuned} have different tokenizers, so their tokens"
            " cannot be compared."
        )
    if place.output.exists():
        raise DataError(f"{place.output} exists already; name another --output or remove it.")
    hashes = {"source": hash_model(comparison.source), "tuned": hash_model(comparison.tuned)}
    asked = {k: str(v) for k, v in asdict(comparison).items()}
    digest = hash_bytes(canonical_json([asked, memory, hashes, [asdict(item) for item in items]]))
    work = place.output.with_name(f".{place.output.name}.work-{digest[:12]}")
    holding = agree_on_holding(
        work,
        lambda: choose_holding(
            (comparison.tuned, comparison.source),
            memory,
            dtype=comparison.dtype,
            num_items=len(items),
            resident_part=comparison.part,
            workers=place.workers,
            ranks=place.size,
        ),
    )
    if place.rank == 0:
        log(holding.described())
    count = -(-len(items) // holding.part)
    summary: dict[str, Any] = {}
    with (
        until_published(place.output, place.rank),
        Crew(work, place.rank, place.size, place.workers, place.visible) as crew,
    ):
        results = crew.run("token-kl", token_kl_part, count, (comparison, items, holding))
        values = np.concatenate([arrays["values"] for arrays in results])
        summary = summarise(values, items, seed)
        if place.rank == 0:
            with ArtifactWriter(place.output, KIND) as artifact:
                artifact.inputs = hashes
                artifact.payload = {"comparison": asked, "holding": asdict(holding)}
                lines = [
                    json.dumps(asdict(item) | _named(row), ensure_ascii=False) + "\n"
                    for item, row in zip(items, values, strict=True)
                ]
                (artifact.path / "items.jsonl").write_text("".join(lines), encoding="utf-8")
                write_json(artifact.path / "token_kl.json", summary)
    if place.rank == 0:
        shutil.rmtree(work)
    return summary


def _named(row: Sequence[float] | np.ndarray) -> dict[str, float]:
    return dict(zip(MEASURES, map(float, row), strict=True))


def summarise(values: np.ndarray, items: Sequence[Item], seed: int) -> dict[str, Any]:
    """Return means and 95 % intervals of all measures, over all items and by group."""
    groups: Mapping[str, list[int]] = {"all": list(range(len(items)))}
    for index, item in enumerate(items):
        if item.group != "all":
            groups = {**groups, item.group: [*groups.get(item.group, []), index]}
    found: dict[str, Any] = {}
    for group, rows in groups.items():
        found[group] = {"items": len(rows)}
        for column, name in enumerate(MEASURES):
            own = values[rows, column]
            interval = bootstrap_mean(own, interval_seed(seed, f"{group}/{name}"))
            found[group][name] = {
                "mean": float(own.mean()),
                "low": interval.low,
                "high": interval.high,
            }
    return found

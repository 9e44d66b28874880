"""From sealed shards to the result: the first N accepted dialogues by id, without duplicates.

Which dialogues are taken depends on their ids alone, never on who finished first: short dialogues
finish early, and the first N to finish would be much shorter than the model's own.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from forgetscale.artifact import ArtifactWriter, canonical_json, hash_bytes, read_manifest
from forgetscale.config.generate import GenerateConfig
from forgetscale.generation.filters import duplicate_flags, first_user_turn
from forgetscale.generation.records import ACCEPTED, FIELDS, STATES, Sample, to_table
from forgetscale.generation.store import RESULT, RunStore

KIND = "dialogues"
_ROWS_PER_FILE = 50_000


@dataclass(frozen=True, slots=True)
class Selection:
    """Which samples of the sealed shards are the result.

    Attributes:
        ids: Their ids, sorted.
        num_accepted: Samples that passed the filters and are no duplicates.
        counts: All samples by state and ``STATE/REASON``, and ``duplicate/exact``, ``/near``.
    """

    ids: frozenset[int]
    num_accepted: int
    counts: Counter[str]


def all_samples(store: RunStore, num_shards: int) -> Iterator[Sample]:
    """Yield the samples of the first shards in the order of their ids."""
    for shard in range(num_shards):
        yield from store.read_shard(shard)


def select(store: RunStore, num_shards: int, config: GenerateConfig) -> Selection:
    """Choose the result.

    Args:
        store: The run.
        num_shards: Shards to look at, all sealed.
        config: How many are wanted, and how duplicates are compared.
    """
    counts: Counter[str] = Counter()
    ids: list[int] = []
    texts: list[str] = []
    takes_all = config.dialogue.kind == "prompts"
    for sample in all_samples(store, num_shards):
        counts[sample.state] += 1
        if sample.reason:
            counts[f"{sample.state}/{sample.reason}"] += 1
        if takes_all or sample.state == ACCEPTED:
            ids.append(sample.sample_id)
            texts.append("" if takes_all else first_user_turn(sample.messages))
    if config.num_dialogues is None:
        return Selection(frozenset(ids), len(ids), counts)
    exact, near = duplicate_flags(texts, config.filters.duplicates, config.filters.near_threshold)
    counts["duplicate/exact"], counts["duplicate/near"] = int(exact.sum()), int(near.sum())
    unique = np.array(ids, np.int64)[~(exact | near)]
    chosen = frozenset(unique[: config.num_dialogues].tolist())
    return Selection(chosen, len(unique), +counts)


def publish(
    store: RunStore,
    num_shards: int,
    selection: Selection,
    *,
    recipe: Mapping[str, Any],
    inputs: Mapping[str, str],
    tokenizer_sha256: str,
    num_top: int = 0,
) -> dict[str, Any]:
    """Write the result as an artefact; return its payload.

    Args:
        store: The run.
        num_shards: Shards that the selection is from.
        selection: What is written.
        recipe: Resolved recipe to record.
        inputs: Name -> content hash of what it was made from.
        tokenizer_sha256: ``tokenizer_hash`` of the model's tokenizer, in every row.
        num_top: Most probable tokens kept at supervised positions.
    """
    schema = pa.schema([*FIELDS, ("tokenizer_sha256", pa.string())])
    chosen = (s for s in all_samples(store, num_shards) if s.sample_id in selection.ids)
    numbers = ResultNumbers()
    num_files = max(1, math.ceil(len(selection.ids) / _ROWS_PER_FILE))
    with ArtifactWriter(store.directory / RESULT, KIND, recipe=recipe, replace=True) as artifact:
        for number in range(num_files):
            rows = [sample for sample, _ in zip(chosen, range(_ROWS_PER_FILE), strict=False)]
            for sample in rows:
                numbers.add(sample)
            table = to_table(rows, pa.schema(FIELDS)).append_column(
                schema.field("tokenizer_sha256"), pa.array([tokenizer_sha256] * len(rows))
            )
            name = f"{KIND}-{number:05d}-of-{num_files:05d}.parquet"
            pq.write_table(table, artifact.path / name, compression="zstd")
        artifact.payload = {
            "run_key": store.key,
            "num_dialogues": len(selection.ids),
            "num_accepted": selection.num_accepted,
            "num_ids": sum(selection.counts[state] for state in STATES),
            "counts": dict(sorted(selection.counts.items())),
            "tokenizer_sha256": tokenizer_sha256,
            "num_top": num_top,
            **numbers.payload(),
        }
        artifact.inputs = dict(inputs)
    return artifact.payload


class ResultNumbers:
    """Lengths and surprise of the chosen dialogues."""

    def __init__(self) -> None:
        self._tokens: Counter[str] = Counter()
        self._turns: Counter[str] = Counter()
        self._nll: dict[str, float] = {"user": 0.0, "assistant": 0.0}
        self._scored: Counter[str] = Counter()
        self._num_tokens = self._num_supervised = self._num_cut = 0

    def add(self, sample: Sample) -> None:
        """Count a dialogue."""
        self._num_tokens += len(sample.input_ids)
        self._num_supervised += sum(end - start for start, end in sample.supervised)
        for turn in sample.turns:
            self._turns[turn.role] += 1
            self._tokens[turn.role] += turn.end - turn.start
            self._num_cut += turn.finish_reason == "length"
            values = [v for v in sample.log_probs[turn.start : turn.end] if v is not None]
            self._nll[turn.role] = self._nll.get(turn.role, 0.0) - math.fsum(values)
            self._scored[turn.role] += len(values)

    def payload(self) -> dict[str, Any]:
        """Return what was counted; surprise in nats a token at temperature 1."""
        roles = sorted(self._turns)
        return {
            "num_tokens": self._num_tokens,
            "num_supervised_tokens": self._num_supervised,
            "num_cut_answers": self._num_cut,
            "mean_turn_tokens": {role: self._tokens[role] / self._turns[role] for role in roles},
            "mean_nll": {
                role: self._nll[role] / self._scored[role] for role in roles if self._scored[role]
            },
        }


def content_hash(directory: Path) -> str:
    """Return the hash over the files of a result; when and by what it was made does not count.

    Raises:
        DataError: It is no result.
    """
    return hash_bytes(canonical_json(read_manifest(directory, KIND)["files"]))


def result_files(directory: Path) -> Sequence[Path]:
    """Return the Parquet files of a result, in order."""
    return sorted(Path(directory).glob(f"{KIND}-*.parquet"))

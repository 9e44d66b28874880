"""What the model said while it wrote, as a logit cache that training reads.

With ``method.loss: {kind: kl, reference: {cache: DIR}}`` the loss of self-written rows is
``KL(source || model)`` over the kept tokens and the rest together, so at the start it is 0 with
gradient 0, token by token, whatever the sampling was. Rows of other sets of the mixture get their
own token as the whole distribution, which makes the same loss their plain cross-entropy. No pass
over the data is needed: the numbers were kept when the dialogues were written.

A set is self-written if one of its input files is a file of the dialogues (by SHA-256).

Shape letters: R rows of a file, M targets, K tokens a target.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from forgetscale.artifact import canonical_json, hash_bytes, hash_file, publish, verify_artifact
from forgetscale.config import Recipe, recipe_dict
from forgetscale.data import TokenSet, TrainingData, open_data
from forgetscale.data.format import unpack_doc_id
from forgetscale.data.logit_cache import KIND, row_spans, rows_per_file, write_span
from forgetscale.errors import ConfigError, DataError
from forgetscale.generation.loading import model_hash
from forgetscale.generation.result import KIND as DIALOGUES
from forgetscale.models import SafetensorsFolder

_SMALLEST_REST = 1e-7
"""A rest below this is rounding of the kept log-probabilities."""


def training_hash(path: Path) -> str:
    """Return the hash by which a training run knows its source model."""
    folder = SafetensorsFolder(path)
    digests = {name: folder.hash_weight_file(name) for name in folder.files()}
    digests["config.json"] = hash_file(path / "config.json")
    return hash_bytes(canonical_json(digests))


@dataclass(frozen=True, slots=True)
class _Written:
    """Dialogues of one file, by row: what was kept of each."""

    supervised: list[list[dict[str, int]]]
    log_probs: list[list[float | None]]
    top_ids: list[list[int]]
    top_log_probs: list[list[float]]


class WrittenTargets:
    """Kept predictions of dialogues, by file and line.

    Args:
        directories: Result folders of ``forgetscale generate``.
        model: Folder of the model that is trained; it must have written them.

    Attributes:
        num_top: Tokens kept at each position.

    Raises:
        DataError: A folder is no result, or of another model, or kept nothing.
    """

    def __init__(self, directories: Sequence[Path], model: Path) -> None:
        wanted = model_hash(model)
        self._files: dict[str, Path] = {}
        found = set()
        for directory in directories:
            manifest = verify_artifact(directory, DIALOGUES)
            if manifest["inputs"]["model"] != wanted:
                raise DataError(
                    f"{directory} was written by another model than {model}; its predictions are no"
                    " targets for this one."
                )
            found.add(int(manifest["payload"]["num_top"]))
            for name, entry in manifest["files"].items():
                self._files[entry["sha256"]] = Path(directory) / name
        if len(found) != 1 or 0 in found:
            raise DataError(
                f"the dialogues keep {sorted(found)} tokens a position; generate them with the same"
                " generate.soft_targets > 0."
            )
        self.num_top = found.pop()

    def sources_of(self, token_set: TokenSet) -> list[Path] | None:
        """Return the dialogue file behind each source of a set; None if it is not self-written.

        Raises:
            DataError: Only some of its sources are dialogues.
        """
        hashes = [source["sha256"] for source in token_set.payload["sources"]]
        known = [self._files.get(name) for name in hashes]
        if not any(known):
            return None
        if None in known:
            raise DataError(
                f"{token_set.path} was built from dialogues and other files; build a set of each."
            )
        return [path for path in known if path is not None]

    def read(self, path: Path) -> _Written:
        """Return what was kept in a file."""
        names = ["supervised", "log_probs", "top_ids", "top_log_probs"]
        columns = pq.read_table(path, columns=names).to_pydict()
        return _Written(*(columns[name] for name in names))


def write_soft_cache(recipe: Recipe, dialogues: Sequence[Path], output: Path) -> dict[str, Any]:
    """Write the logit cache of a recipe's data from the dialogues in it.

    Args:
        recipe: A training recipe with SFT rows or a mixture of them.
        dialogues: Result folders of ``forgetscale generate``.
        output: Folder of the cache; must not exist.

    Returns:
        The payload: targets by kind.

    Raises:
        ConfigError: The data are no SFT rows, or none of them are from the dialogues.
        DataError: Folders are not as they must be, or do not go together.
    """
    if output.exists():
        raise DataError(f"{output} exists already; name another folder or remove it.")
    data = open_data(recipe.data, recipe.model.path)
    written = WrittenTargets(dialogues, recipe.model.path)
    sources = _sources(data, written)
    per_file = rows_per_file(data.block_size, written.num_top)
    sets: list[dict[str, Any]] = [
        {"content_hash": part.token_set.content_hash, "num_rows": part.token_set.num_rows}
        for part in data.parts
    ]
    spans = row_spans([item["num_rows"] for item in sets], per_file)
    work = output.with_name(f".{output.name}.work")
    shutil.rmtree(work, ignore_errors=True)
    losses: list[np.ndarray] = []
    counts = {"soft": 0, "hard": 0}
    readers = [
        _SetReader(part.token_set, found, written)
        for part, found in zip(data.parts, sources, strict=True)
    ]
    for span in spans:
        columns = readers[span.set_index].columns(span.first, span.num_rows)
        path = work / span.file
        path.parent.mkdir(parents=True, exist_ok=True)
        write_span(path, columns)
        losses.append(columns["text_nll"])
        counts["soft" if sources[span.set_index] else "hard"] += len(columns["places"])
    payload: dict[str, Any] = {
        "model_hash": training_hash(recipe.model.path),
        "tokenizer_sha256": data.parts[0].token_set.tokenizer_sha256,
        "block_size": data.block_size,
        "document_mask": recipe.data.document_mask,
        "top_k": written.num_top,
        "stored_dtype": "float32",
        "rows_per_file": per_file,
        "sets": sets,
        "num_targets": sum(counts.values()),
        "num_targets_by_kind": counts,
        "median_text_nll": float(np.median(np.concatenate(losses).astype(np.float64))),
    }
    inputs = {"model": str(payload["model_hash"])}
    inputs |= {f"set-{n:03d}": item["content_hash"] for n, item in enumerate(sets)}
    made_by = recipe_dict(recipe)
    publish(work, output, kind=KIND, payload=payload, inputs=inputs, recipe=made_by)
    return payload


def _sources(data: TrainingData, written: WrittenTargets) -> list[list[Path] | None]:
    """Return the dialogue files behind each set, None for sets that are not self-written.

    Raises:
        ConfigError: The data are no SFT rows, or none of them are from the dialogues.
    """
    sources = []
    for part in data.parts:
        if not part.token_set.is_supervised:
            raise ConfigError(
                f"{part.token_set.path} holds plain text; soft targets are for SFT rows (kind: sft)"
            )
        sources.append(written.sources_of(part.token_set))
    if not any(sources):
        raise ConfigError(
            "no set of the recipe's data was built from these dialogues; build rows from their"
            " Parquet files with python -m data_prep build --sft."
        )
    return sources


class _SetReader:
    """Targets of one token set.

    Args:
        token_set: The set.
        sources: Dialogue file behind each of its sources, or None: hard targets.
        written: What was kept.
    """

    def __init__(
        self, token_set: TokenSet, sources: list[Path] | None, written: WrittenTargets
    ) -> None:
        self._set = token_set
        self._sources = sources
        self._num_top = written.num_top
        self._read = functools.lru_cache(maxsize=2)(written.read)

    def columns(self, first: int, num_rows: int) -> dict[str, np.ndarray]:
        """Return the tensors of one file of the cache."""
        rows = range(first, first + num_rows)
        ids, mask = self._set.read(rows).numpy(), self._set.loss_mask(rows).numpy()
        lens = self._set.document_lens(rows).numpy()
        row, place = np.nonzero(mask)
        ends = lens.cumsum(1) + np.arange(num_rows)[:, None] * mask.shape[1]
        piece = np.searchsorted(ends.ravel(), row * mask.shape[1] + place, side="right")
        labels = ids[row, place]
        found = (
            _hard_targets(labels, self._num_top)
            if self._sources is None
            else self._soft_targets(first, row, piece - row * lens.shape[1])
        )
        _, text = np.unique(piece, return_inverse=True)
        sizes = np.bincount(text)
        nll = -np.bincount(text, weights=found["log_prob"].astype(np.float64)) / sizes
        return {
            "offsets": np.searchsorted(row, np.arange(num_rows + 1)).astype(np.int64),
            "places": place.astype(np.int32),
            **found,
            "text": text.astype(np.int32),
            "text_nll": nll.astype(np.float32),
        }

    def _soft_targets(
        self, first: int, row: np.ndarray, piece: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Return what was kept at the targets of each document of each row, in order."""
        assert self._sources is not None
        parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        for number in np.unique(row):
            here = piece[row == number]
            doc_ids = self._set.document_ids(first + int(number))
            for index in np.unique(here):
                source, line = unpack_doc_id(doc_ids[index])
                parts.append(self._dialogue(source, line, int((here == index).sum())))
        ids, tops, chosen = (np.concatenate(items) for items in zip(*parts, strict=True))
        rest = 1.0 - np.exp(tops.astype(np.float64)).sum(1)
        with np.errstate(divide="ignore"):
            log_rest = np.where(rest > _SMALLEST_REST, np.log(np.maximum(rest, 0)), -np.inf)
        return {
            "log_prob": chosen,
            "ids": ids,
            "log_probs": tops,
            "log_rest": log_rest.astype(np.float32),
        }

    def _dialogue(
        self, source: int, line: int, count: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return tokens, their log-probabilities, and those of the labels, of one dialogue."""
        assert self._sources is not None
        path = self._sources[source]
        written = self._read(path)
        at = line - 1
        ids = np.array(written.top_ids[at], np.int32).reshape(-1, self._num_top)
        tops = np.array(written.top_log_probs[at], np.float32).reshape(-1, self._num_top)
        values = written.log_probs[at]
        chosen = [
            values[place]
            for part in written.supervised[at]
            for place in range(part["start"], part["end"])
        ]
        if len(ids) < count or len(ids) != len(chosen) or None in chosen[:count]:
            raise DataError(
                f"{path} row {line} keeps {len(ids)} predictions for {count} targets of"
                f" {self._set.path}; generate again with generate.soft_targets and build the rows"
                " again."
            )
        return ids[:count], tops[:count], np.array(chosen[:count], np.float32)


def _hard_targets(labels: np.ndarray, num_top: int) -> Mapping[str, np.ndarray]:
    """Return the label as the whole distribution; the other ids have probability 0."""
    count = len(labels)
    # Distinct ids in each row: the label first, then the lowest others.
    others = np.tile(np.arange(num_top, dtype=np.int64), (count, 1))
    clash = others == labels[:, None]
    others = np.where(clash.cumsum(1) > 0, others + 1, others)
    ids = np.concatenate([labels[:, None], others[:, : num_top - 1]], 1)
    tops = np.full((count, num_top), -np.inf, np.float32)
    tops[:, 0] = 0.0
    return {
        "log_prob": np.zeros(count, np.float32),
        "ids": ids.astype(np.int32),
        "log_probs": tops,
        "log_rest": np.full(count, -np.inf, np.float32),
    }

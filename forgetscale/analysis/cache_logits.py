"""The offline pass that writes a logit cache: what the source model says about every target.

Files are the same for any number of ranks: rows are cut into files and micro-batches by their
numbers alone, and ranks take whole files in turn. A file that is there is whole, so a pass that was
interrupted goes on with the next one.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from forgetscale.analysis.passes import Seen, Span, walk
from forgetscale.artifact import (
    hash_file,
    publish,
    read_manifest,
    wait_until_visible,
    write_json,
)
from forgetscale.config import Recipe, recipe_dict
from forgetscale.data import TokenSet, TrainingData, open_data, require_vocabulary
from forgetscale.data.logit_cache import (
    KIND,
    STORED_DTYPES,
    RowSpan,
    map_file,
    row_spans,
    rows_per_file,
    write_span,
)
from forgetscale.engine import RunLog, open_source
from forgetscale.engine.extras import DEFAULT_TOP_K, reference_of
from forgetscale.engine.start import SourceModel, start_engine
from forgetscale.errors import ConfigError, DataError, NonFiniteError
from forgetscale.ops.observe import reference_observer
from forgetscale.progress import Progress
from forgetscale.zero3 import World

SUMMARY = "keep the source model's predictions for losses that stay close to it"
JOB_FILE = "job.json"


def add_arguments(parser: Any) -> None:
    """Add the options of this analysis."""
    parser.add_argument(
        "--top-k",
        type=int,
        default=DEFAULT_TOP_K,
        metavar="K",
        help="most likely tokens kept per target; 0 keeps the target's own probability only, which"
        " is enough for iw_sft, psft and flow (default: %(default)s)",
    )
    parser.add_argument(
        "--stored-dtype",
        choices=tuple(STORED_DTYPES),
        default="float32",
        help="type of the kept log-probabilities (default: %(default)s)",
    )


def run(options: argparse.Namespace, recipe: Recipe, world: World, log: RunLog) -> None:
    """Write the cache that a recipe names, or ``--output``. Collective: every rank must call it."""
    cache_logits(
        recipe, world, log, output_of(options, recipe), options.top_k, options.stored_dtype
    )


def output_of(options: argparse.Namespace, recipe: Recipe) -> Path:
    """Return the folder that is written.

    Raises:
        ConfigError: Neither the command nor the recipe names one.
    """
    reference = reference_of(recipe)
    found = options.output or (None if reference is None else reference.cache)
    if found is None:
        raise ConfigError(
            "--cache-logits has no folder to write: give --output, or a recipe with"
            " method.loss.reference.cache."
        )
    return Path(found)


def cache_logits(
    recipe: Recipe, world: World, log: RunLog, output: Path, top_k: int, stored_dtype: str
) -> None:
    """Write a logit cache of the recipe's model and data.

    Args:
        recipe: Resolved recipe; its protection and loss do not matter.
        world: This process among all.
        log: Log of the command.
        output: Folder of the cache. One of the same content is left as it is.
        top_k: Most likely tokens per target, 0 to the vocabulary.
        stored_dtype: Key of ``STORED_DTYPES``.

    Raises:
        ConfigError: ``top_k`` is out of range, or the folder holds something else.
        DataError: Model or data are missing or damaged, or do not go together.
        NonFiniteError: The model's prediction is not finite.

    Collective: every rank must call it.
    """
    source = open_source(recipe, world)
    size = source.config.vocab_size
    if not 0 <= top_k <= size:
        raise ConfigError(
            f"--top-k is {top_k}, but {recipe.model.path} has a vocabulary of {size}; give 0 to"
            f" {size}."
        )
    data = open_data(recipe.data, recipe.model.path)
    for part in data.parts:
        require_vocabulary(part.token_set, size, recipe.model.path)
    job = describe_job(recipe, source, data, top_k, stored_dtype)
    if world.on_main(lambda: _is_done(output, job)):
        log(f"{output} holds this cache already")
        return
    spans = row_spans([item["num_rows"] for item in job["sets"]], job["rows_per_file"])
    work = output.with_name(f".{output.name}.work")
    done = set(world.on_main(lambda: _open_work(work, job, log)))
    if done:
        log(f"{len(done)} of {len(spans)} files are there from an earlier start")
    missing = [span for span in spans if span.file not in done]
    if missing:
        _write_spans(recipe, world, log, source, data, missing, job, work / "files")
    world.barrier()
    _finish(recipe, world, log, spans, work, output, job)


def describe_job(
    recipe: Recipe, source: SourceModel, data: TrainingData, top_k: int, stored_dtype: str
) -> dict[str, Any]:
    """Return what a cache depends on: two caches with the same description are the same."""
    return {
        "model_hash": source.content_hash,
        "tokenizer_sha256": data.parts[0].token_set.tokenizer_sha256,
        "vocab_size": source.config.vocab_size,
        "block_size": data.block_size,
        "document_mask": recipe.data.document_mask,
        "top_k": top_k,
        "stored_dtype": stored_dtype,
        "rows_per_file": rows_per_file(data.block_size, top_k),
        "sets": [
            {"content_hash": part.token_set.content_hash, "num_rows": part.token_set.num_rows}
            for part in data.parts
        ],
        "computed_with": {
            "dtype": recipe.model.dtype,
            "attn_implementation": recipe.model.attn_implementation,
            "micro_batch_size": recipe.train.micro_batch_size,
            "loss_chunk_size": recipe.train.loss_chunk_size,
        },
    }


def _is_done(output: Path, job: Mapping[str, Any]) -> bool:
    if not output.exists():
        return False
    payload = read_manifest(output, KIND)["payload"]
    for name, wanted in job.items():
        if payload.get(name) != wanted:
            raise ConfigError(
                f"{output} holds another logit cache ({name} is {payload.get(name)!r} there and"
                f" {wanted!r} here); name another folder or remove it."
            )
    return True


def _open_work(work: Path, job: Mapping[str, Any], log: RunLog) -> list[str]:
    """Return the files that are there from an earlier start of the same job."""
    if (work / JOB_FILE).is_file() and json.loads((work / JOB_FILE).read_bytes()) == job:
        files = work / "files"
        return [path.relative_to(files).as_posix() for path in files.rglob("rows-*.safetensors")]
    if work.exists():
        log(f"{work} is from another job and is removed")
        shutil.rmtree(work)
    for index in range(len(job["sets"])):
        (work / "files" / f"set-{index:03d}").mkdir(parents=True)
    write_json(work / JOB_FILE, job)
    return []


def _write_spans(
    recipe: Recipe,
    world: World,
    log: RunLog,
    source: SourceModel,
    data: TrainingData,
    spans: list[RowSpan],
    job: Mapping[str, Any],
    files: Path,
) -> None:
    dtype = STORED_DTYPES[job["stored_dtype"]]

    def consume(number: int, seen: Seen) -> None:
        span = spans[number]
        token_set = data.parts[span.set_index].token_set
        bad = ~torch.isfinite(seen.columns["log_prob"])
        if bool(bad.any()):
            row = span.first + int(seen.row[bad][0])
            raise NonFiniteError(
                f"what {recipe.model.path} predicts in row {row} of {token_set.path} is not"
                " finite; nothing of it can be trained on."
            )
        path = files / span.file
        path.parent.mkdir(parents=True, exist_ok=True)
        write_span(path, columns_of(token_set, span, seen, dtype))

    total = sum(span.num_rows for span in spans)
    engine = start_engine(recipe, world, source, plan=None, training=False)
    with Progress(
        total, "cache logits", unit="row", log_path=log.path, visible=log.visible
    ) as progress:
        todo = [Span(s.set_index, np.arange(s.first, s.first + s.num_rows)) for s in spans]
        walk(engine, recipe, data, todo, reference_observer(job["top_k"]), consume, progress)
    engine.destroy()


def columns_of(
    token_set: TokenSet, span: RowSpan, seen: Seen, dtype: np.dtype[Any]
) -> dict[str, np.ndarray]:
    """Return the tensors of one file.

    Args:
        token_set: The set the rows are from.
        span: The rows.
        seen: What the model said about their targets.
        dtype: Type of the kept log-probabilities.
    """
    rows, places = seen.row.numpy(), seen.place.numpy()
    lens = token_set.document_lens(np.arange(span.first, span.first + span.num_rows)).numpy()
    # Ends of all document pieces, rows laid end to end, and how many lie before each target.
    ends = lens.cumsum(1) + np.arange(span.num_rows)[:, None] * token_set.block_size
    piece = np.searchsorted(ends.ravel(), rows * token_set.block_size + places, side="right")
    _, text = np.unique(piece, return_inverse=True)
    log_prob = seen.columns["log_prob"].numpy()
    counts = np.bincount(text)
    text_nll = -np.bincount(text, weights=log_prob.astype(np.float64)) / counts
    return {
        "offsets": np.searchsorted(rows, np.arange(span.num_rows + 1)).astype(np.int64),
        "places": places.astype(np.int32),
        "log_prob": log_prob.astype(np.float32),
        "ids": seen.columns["ids"].numpy(),
        "log_probs": seen.columns["log_probs"].numpy().astype(dtype),
        "log_rest": seen.columns["log_rest"].numpy().astype(np.float32),
        "text": text.astype(np.int32),
        "text_nll": text_nll.astype(np.float32),
    }


def _finish(
    recipe: Recipe,
    world: World,
    log: RunLog,
    spans: list[RowSpan],
    work: Path,
    output: Path,
    job: Mapping[str, Any],
) -> None:
    """Hash the files, each rank its share, and publish them."""
    hashes, losses, num_targets = {}, [np.empty(0, np.float32)], 0
    for span in spans[world.rank :: world.size]:
        path = work / "files" / span.file
        hashes[span.file] = hash_file(path)
        file = map_file(path)
        losses.append(np.array(file["text_nll"]))
        num_targets += len(file["places"])
    parts = world.gather_objects((hashes, np.concatenate(losses), num_targets))
    if not (total := sum(part[2] for part in parts)):
        raise DataError("no token of the data is a target, so there is nothing to keep.")

    def write() -> str:
        text_nll = np.concatenate([part[1] for part in parts])
        payload = {
            **job,
            "num_targets": total,
            "num_texts": len(text_nll),
            "median_text_nll": float(np.median(text_nll.astype(np.float64))),
        }
        manifest = publish(
            work / "files",
            output,
            kind=KIND,
            payload=payload,
            inputs={"model": job["model_hash"]}
            | {f"set-{n:03d}": part["content_hash"] for n, part in enumerate(job["sets"])},
            recipe=recipe_dict(recipe),
            known_hashes={name: value for part in parts for name, value in part[0].items()},
        )
        shutil.rmtree(work)
        return str(manifest["self_hash"])

    wait_until_visible(output, world.on_main(write))
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    log(f"wrote {output}: {total:,} targets, top {job['top_k']}, {size / 1e6:,.1f} MB")

"""Logits of two models for the same items: both held whole, or both layer by layer.

Which of the two is decided once for a job and written into its work folder, because the two agree
to rounding, not to the bit, and ranks may have different memory.

Shape letters: T answer tokens of an item, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from forgetscale.checkpoint.snapshot import free_host_memory
from forgetscale.errors import DataError
from forgetscale.evaluation.model import LoadedModel, load_model
from forgetscale.generation.leases import create_whole
from forgetscale.generation.loading import default_device
from forgetscale.models import load_tokenizer, read_model_config
from forgetscale.models.raw import RawFolder
from forgetscale.models.streamed import STREAMED_KINDS, StreamedModel, require_streamable

Memory = Literal["auto", "stream", "resident"]
MEMORY_FILE = "memory.json"
STREAMED_ITEMS = 512
"""Most items of a part that is streamed: a part reads both models once."""
STREAMED_TOKENS = 1 << 14
"""Tokens whose hidden states are held at a time; 16,384 x 5,120 x 4 bytes are 0.34 GB."""
_ROOM = 0.7
_LOADED: dict[tuple[Path, str], LoadedModel] = {}


@dataclass(frozen=True, slots=True)
class Question:
    """What one model is asked for one item."""

    prompt: str
    answer: str
    """Empty: only the token behind the prompt is looked at."""


@dataclass(frozen=True, slots=True)
class Holding:
    """How a job holds its models.

    Attributes:
        memory: ``stream`` or ``resident``.
        part: Items of one part of work.
        needed: Bytes that both models whole would take in every process together.
        free: Bytes that were free; None where nothing tells.
    """

    memory: Memory
    part: int
    needed: int
    free: int | None

    def described(self) -> str:
        """Return it in a sentence."""
        free = "unknown" if self.free is None else f"{self.free / 1e9:.2f} GB"
        how = "layer by layer" if self.memory == "stream" else "whole"
        return f"models {how}: whole ones need {self.needed / 1e9:.2f} GB, free {free}"


def needed_bytes(folder: Path, dtype: str) -> int:
    """Return the bytes of a model's weights in memory."""
    tensors = RawFolder(folder).tensors.values()
    if dtype == "auto":
        return sum(tensor.num_bytes for tensor in tensors)
    size = int(getattr(torch, dtype).itemsize)
    return sum(tensor.numel * size for tensor in tensors)


def _free_bytes() -> int | None:
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info(default_device())[0])
    return free_host_memory()


def choose_holding(
    folders: Sequence[Path],
    wanted: Memory,
    *,
    dtype: str,
    num_items: int,
    resident_part: int,
    workers: int,
    ranks: int,
) -> Holding:
    """Decide how models are held; ``auto`` streams what takes more than 0.7 of free memory.

    Args:
        folders: The models.
        wanted: What the user asked for.
        dtype: ``auto``, ``float32`` or ``bfloat16``.
        num_items: Items in all.
        resident_part: Items of a part where models are held whole.
        workers: Processes of this machine, each with both models.
        ranks: Independent ranks.

    Raises:
        ConfigError: Layer by layer was asked for and an architecture is not known to work so.
    """
    needed, free = workers * sum(needed_bytes(item, dtype) for item in folders), _free_bytes()
    configs = [read_model_config(folder) for folder in folders]
    memory = wanted
    if wanted == "auto":
        known = all(config.model_type in STREAMED_KINDS for config in configs)
        fits = free is None or needed <= _ROOM * free
        memory = "resident" if fits or not known else "stream"
    if memory == "stream":
        for config, folder in zip(configs, folders, strict=True):
            require_streamable(config, folder)
    each = -(-num_items // (workers * ranks))
    part = resident_part if memory == "resident" else max(1, min(STREAMED_ITEMS, each))
    return Holding(memory, part, needed, free)


def agree_on_holding(work: Path, choose: Callable[[], Holding]) -> Holding:
    """Return what the first rank of a job chose; a job that goes on keeps to it."""
    path = work / MEMORY_FILE
    if not path.exists():
        own = choose()
        work.mkdir(parents=True, exist_ok=True)
        content = {name: getattr(own, name) for name in Holding.__dataclass_fields__}
        create_whole(path, json.dumps(content).encode())
    return Holding(**json.loads(path.read_bytes()))


def question_ids(
    tokenizer: Any, stop_ids: Sequence[int], question: Question, limit: int | None, where: Path
) -> tuple[list[int], int]:
    """Return what a model reads, and at how many of its last positions it is looked at.

    Raises:
        DataError: The text is longer than the model's positions.
    """
    ids = [*tokenizer(question.prompt)["input_ids"]]
    if len(ids) > 1 and ids[-1] in stop_ids:
        ids = ids[:-1]
    answer: list[int] = []
    if question.answer:
        answer = tokenizer(question.answer, add_special_tokens=False)["input_ids"]
    ids += answer[:-1]
    if not ids:
        raise DataError(f"the prompt {question.prompt[:60]!r} gives {where} no token to read.")
    if limit is not None and len(ids) > limit:
        raise DataError(
            f"the prompt {question.prompt[:60]!r} and its answer have {len(ids)} tokens, but"
            f" {where} has {limit} positions; shorten it."
        )
    return ids, max(len(answer), 1)


def _whole(folder: Path, dtype: str) -> LoadedModel:
    key = (folder, dtype)
    if key not in _LOADED:
        _LOADED[key] = load_model(folder, dtype=dtype, device=default_device())
    return _LOADED[key]


@torch.no_grad()
def resident_logits(
    folders: Sequence[Path], questions: Sequence[Sequence[Question]], dtype: str
) -> Iterator[tuple[Tensor, ...]]:
    """Yield, for each item, ``[T, V]`` fp32 logits of every model.

    Args:
        folders: The models.
        questions: For each item, what each model is asked.
        dtype: ``auto``, ``float32`` or ``bfloat16``.
    """
    models = [_whole(folder, dtype) for folder in folders]
    for asked in questions:
        found = []
        for loaded, question, folder in zip(models, asked, folders, strict=True):
            limit = getattr(loaded.model.config, "max_position_embeddings", None)
            ids, count = question_ids(loaded.tokenizer, loaded.stop_ids, question, limit, folder)
            rows = torch.tensor([ids], device=loaded.model.device)
            logits: Tensor = loaded.model(rows, logits_to_keep=count, use_cache=False).logits
            found.append(logits[0, -count:].float().cpu())
        yield tuple(found)


@torch.no_grad()
def streamed_logits(
    folders: Sequence[Path], questions: Sequence[Sequence[Question]], dtype: str
) -> Iterator[tuple[Tensor, ...]]:
    """Yield what ``resident_logits`` yields, with one layer of one model in memory at a time.

    Hidden states of at most 16,384 tokens (or one text) wait between layers; at the end both
    models' heads are held together, so that no logits wait.
    """
    models = [StreamedModel(item, dtype=dtype, device=default_device()) for item in folders]
    texts: list[list[tuple[list[int], int]]] = []
    for column, (model, folder) in enumerate(zip(models, folders, strict=True)):
        tokenizer = load_tokenizer(folder)
        rows = [
            question_ids(tokenizer, model.stop_ids, asked[column], model.max_tokens, folder)
            for asked in questions
        ]
        texts.append(rows)
    try:
        for group in _groups([[len(ids) for ids, _ in rows] for rows in texts]):
            kept = []
            for model, rows in zip(models, texts, strict=True):
                own = [rows[item] for item in group]
                kept.append(model.hidden_states([ids for ids, _ in own], [n for _, n in own]))
            with models[0].head() as first, models[1].head() as second:
                for mine, theirs in zip(*kept, strict=True):
                    yield first(mine).float().cpu(), second(theirs).float().cpu()
    finally:
        for model in models:
            model.close()


def _groups(lengths: Sequence[Sequence[int]]) -> Iterator[range]:
    """Cut items into groups of at most ``STREAMED_TOKENS`` tokens for every model."""
    start, used = 0, [0] * len(lengths)
    count = len(lengths[0])
    for item in range(count):
        own = [rows[item] for rows in lengths]
        if item > start and any(a + b > STREAMED_TOKENS for a, b in zip(used, own, strict=True)):
            yield range(start, item)
            start, used = item, [0] * len(lengths)
        used = [a + b for a, b in zip(used, own, strict=True)]
    yield range(start, count)

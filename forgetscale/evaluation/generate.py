"""Answers from a plain transformers model: batched, left-padded, with a key-value cache.

Every rank holds its own copy of the model and answers its own batches; nothing is communicated
while decoding, so ranks may need different numbers of steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig

from forgetscale.artifact import canonical_json, hash_bytes
from forgetscale.errors import DataError
from forgetscale.evaluation.asked import Asked, NothingKept, RequestLog, answer_each_once
from forgetscale.evaluation.collective import Collective
from forgetscale.evaluation.decoding import Decoding
from forgetscale.evaluation.plan import PlannedBatch
from forgetscale.evaluation.prompts import ChatPrompts


@dataclass(frozen=True, slots=True)
class Answer:
    """A generated answer.

    Attributes:
        text: Decoded answer without special tokens.
        stopped: True if the model ended its turn, False if it was cut at the length limit.
    """

    text: str
    stopped: bool


def plain_generation_config(**settings: Any) -> GenerationConfig:
    """Return transformers' generation settings with nothing but ``settings`` changed."""
    make: Callable[..., GenerationConfig] = GenerationConfig
    return make(**settings)


def generation_config(
    decoding: Decoding, *, max_new_tokens: int, stop_ids: Sequence[int], pad_id: int
) -> GenerationConfig:
    """Return the transformers settings for ``decoding``."""
    settings: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "do_sample": decoding.temperature > 0,
        "num_beams": decoding.beams,
        "use_cache": True,
        "eos_token_id": list(stop_ids),
        "pad_token_id": pad_id,
        "repetition_penalty": decoding.repetition_penalty,
    }
    if decoding.temperature > 0:
        settings |= {
            "temperature": decoding.temperature,
            "top_p": decoding.top_p,
            "top_k": decoding.top_k,
        }
    return plain_generation_config(**settings)


@torch.no_grad()
def generate_answers(
    model: Any,
    prompts: ChatPrompts,
    prompt_rows: Sequence[Sequence[int]],
    *,
    collective: Collective,
    batch_size: int,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    decoding: Decoding,
    seed: int,
    names: Sequence[str] | None = None,
    log_dir: Path | None = None,
    on_call: Callable[[], None] = lambda: None,
) -> list[Answer]:
    """Answer all prompts.

    Collective: every rank must call it, with the same prompts.

    The answers are the same for any number of ranks. Greedy answers in fp32 do not depend on the
    batch size either; sampled ones do, since each batch has its own seed.

    Args:
        model: Causal language model with no defaults of its own left in ``generation_config``.
        prompts: Chat template, for padding and decoding.
        prompt_rows: Token ids of each prompt.
        collective: The processes that evaluate together.
        batch_size: Prompts decoded together.
        max_new_tokens: Longest answer in tokens, the end-of-turn token included.
        stop_ids: Tokens that end an answer.
        decoding: Greedy, beams or sampling.
        seed: Seed of sampling; unused when greedy.
        names: Name of each prompt, by which its answer is kept; None numbers them.
        log_dir: Folder in which answers are kept and found again; None keeps none.
        on_call: Called after each batch of this rank.

    Returns:
        One answer per prompt, in order, on all ranks.

    Raises:
        DataError: A prompt and its answer do not fit the model's positions.
    """
    _require_fit(model, max(len(row) for row in prompt_rows), max_new_tokens)
    pad_id = prompts.pad_id
    config = generation_config(
        decoding, max_new_tokens=max_new_tokens, stop_ids=stop_ids, pad_id=pad_id
    )
    how = [max_new_tokens, list(stop_ids), asdict(decoding), seed]
    asked = [
        Asked(name, hash_bytes(canonical_json([list(row), *how])))
        for name, row in zip(names or map(str, range(len(prompt_rows))), prompt_rows, strict=True)
    ]

    def answer(batch: PlannedBatch) -> list[tuple[str, bool]]:
        if batch.dummy:
            return []
        rows = [prompt_rows[item] for item in batch.items]
        with torch.random.fork_rng(enabled=decoding.temperature > 0):
            if decoding.temperature > 0:
                torch.manual_seed(seed_of_batch(seed, batch.number))
            new_ids = _decode(model, rows, pad_id, config)
        return [_cut(ids, set(stop_ids), prompts) for ids in new_ids]

    found = answer_each_once(
        asked,
        [len(row) for row in prompt_rows],
        answer,
        collective=collective,
        batch_size=batch_size,
        log=NothingKept() if log_dir is None else RequestLog(log_dir, collective),
        on_call=on_call,
    )
    return [Answer(*found[item.key]) for item in asked]


def _require_fit(model: Any, longest: int, max_new_tokens: int) -> None:
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and longest + max_new_tokens > limit:
        raise DataError(
            f"the longest prompt has {longest} tokens and the answer may have {max_new_tokens}, but"
            f" the model has {limit} positions; lower max_new_tokens or shorten the prompt."
        )


def seed_of_batch(seed: int, number: int) -> int:
    """Return the seed of batch ``number``, the same on whatever rank it runs."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint32)[0])


def _decode(
    model: Any, rows: Sequence[Sequence[int]], pad_id: int, config: GenerationConfig
) -> list[list[int]]:
    """Return the new ids of each row, padded behind its end."""
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), pad_id, dtype=torch.int64)
    mask = torch.zeros((len(rows), longest), dtype=torch.int64)
    for index, row in enumerate(rows):
        ids[index, longest - len(row) :] = torch.tensor(row, dtype=torch.int64)
        mask[index, longest - len(row) :] = 1
    device = model.device
    whole = model.generate(
        input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=config
    )
    new_ids: list[list[int]] = whole[:, longest:].tolist()
    return new_ids


def _cut(ids: Sequence[int], stop_ids: set[int], prompts: ChatPrompts) -> tuple[str, bool]:
    """Return the text up to a token that ends it, and whether there is one."""
    for position, token_id in enumerate(ids):
        if token_id in stop_ids:
            return prompts.decode(ids[:position]), True
    return prompts.decode(ids), False

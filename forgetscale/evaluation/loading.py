"""From task names to tasks that are ready to be measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from forgetscale.data import TokenSet, require_same_tokenizer
from forgetscale.errors import DataError
from forgetscale.evaluation.forced import TokenPerplexity
from forgetscale.evaluation.tasks import ChatTask, is_perplexity, load_chat_task


def load_tasks(
    names: Sequence[str], task_dir: Path, *, tokenizer: Any, max_rows: int | None = None
) -> list[ChatTask | TokenPerplexity]:
    """Load every named task.

    Args:
        names: Task names, checked by ``check_task_names``.
        task_dir: Folder of tasks.
        tokenizer: The model's tokenizer; token sets made with another one are refused.
        max_rows: Rows used of each token set; None for all.

    Raises:
        DataError: A task is malformed or does not fit the tokenizer.
    """
    return [
        load_perplexity(task_dir, name, tokenizer=tokenizer, max_rows=max_rows)
        if is_perplexity(name)
        else load_chat_task(task_dir, name)
        for name in names
    ]


def load_perplexity(
    task_dir: Path, name: str, *, tokenizer: Any, max_rows: int | None = None
) -> TokenPerplexity:
    """Open the token set ``task_dir/perplexity/NAME`` and read the rows that are scored.

    Of SFT rows every conversation is scored on its own, at its supervised tokens.

    Args:
        task_dir: Folder of tasks.
        name: Task name, ``perplexity/NAME``.
        tokenizer: The model's tokenizer. If it was loaded from a folder, its files are compared
            by hash with those the set was made with, else only the size of the vocabulary.
        max_rows: Use the first rows only, to bound the cost of frequent evaluation, >= 1.

    Raises:
        DataError: There is no valid token set, or it does not fit the tokenizer.
        ValueError: ``max_rows`` is below 1.
    """
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"max_rows must be >= 1, got {max_rows}")
    token_set = TokenSet(Path(task_dir) / name)
    folder = Path(str(tokenizer.name_or_path))
    if folder.is_dir():
        require_same_tokenizer(token_set, folder)
    elif token_set.vocab_size > len(tokenizer):
        raise DataError(
            f"{token_set.path} was made with {token_set.vocab_size} token ids, but the tokenizer"
            f" {tokenizer.name_or_path} has {len(tokenizer)}; build the token set again with the"
            " tokenizer of the model."
        )
    num_rows = min(token_set.num_rows, max_rows or token_set.num_rows)
    if token_set.is_supervised:
        return _conversations(name, token_set, num_rows)
    num_bytes = token_set.num_text_bytes
    return TokenPerplexity(
        name,
        token_set.read(range(num_rows)),
        tokens_per_byte=token_set.num_tokens / num_bytes if num_bytes else None,
        content_hash=token_set.content_hash,
        row_tokens=token_set.document_lens(range(num_rows)).sum(1)
        if token_set.num_padding_tokens
        else None,
    )


def _conversations(name: str, token_set: TokenSet, num_rows: int) -> TokenPerplexity:
    """Return the conversations of the first SFT rows, one a row, however they were packed."""
    ids, lens = token_set.read(range(num_rows)), token_set.document_lens(range(num_rows))
    mask = token_set.loss_mask(range(num_rows))
    texts: list[tuple[Tensor, Tensor]] = []
    for row, row_lens in enumerate(lens.tolist()):
        start = 0
        for length in row_lens:
            here = slice(start, start + length)
            # A piece cut off a longer conversation may hold no supervised token.
            if mask[row, here].any():
                texts.append((ids[row, here], mask[row, here]))
            start += length
    return TokenPerplexity(
        name,
        pad_sequence([text for text, _ in texts], batch_first=True),
        tokens_per_byte=None,
        content_hash=token_set.content_hash,
        row_tokens=torch.tensor([len(text) for text, _ in texts]),
        supervised=pad_sequence([scored for _, scored in texts], batch_first=True),
    )

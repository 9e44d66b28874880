"""Does an alignment set hold refusals? Without them nothing of what must be kept is measured.

The rule: an answer refuses if it opens with one of a list of texts, ignoring case. Answers of SFT
rows are their supervised stretches. Other sets do not say where an answer begins; there every
stretch of text counts that starts a row, a line, or follows a special token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch

from forgetscale.config import CalibrationConfig
from forgetscale.data import TokenSet, calibration_rows
from forgetscale.errors import DataError
from forgetscale.evaluation.scoring import is_refusal

_ROWS_AT_A_TIME = 256


class RefusalCount(NamedTuple):
    """What was found in the rows that are used."""

    rows: int
    refusing: int
    """Rows with at least one refusal."""


def _stretches(ids: Sequence[int], keep: Sequence[bool]) -> Iterator[list[int]]:
    """Yield runs of ids that are kept."""
    for kept, run in groupby(zip(ids, keep, strict=True), key=lambda item: item[1]):
        if kept:
            yield [token for token, _ in run]


def count_refusals(
    token_set: TokenSet, num_rows: int, tokenizer: Any, openings: Sequence[str]
) -> RefusalCount:
    """Count the rows that hold a refusal, of those a calibration uses.

    Args:
        token_set: Alignment data.
        num_rows: ``calibration.num_blocks``.
        tokenizer: The tokenizer it was made with.
        openings: Openings of a refusal.
    """
    special = set(tokenizer.all_special_ids)
    chosen = calibration_rows(token_set.num_rows, num_rows)
    refusing = 0
    for first in range(0, len(chosen), _ROWS_AT_A_TIME):
        rows = chosen[first : first + _ROWS_AT_A_TIME]
        ids = token_set.read(rows)
        answers = token_set.loss_mask(rows) if token_set.is_supervised else torch.ones_like(ids)
        for row, kept in zip(ids.tolist(), answers.bool().tolist(), strict=True):
            kept = [flag and token not in special for token, flag in zip(row, kept, strict=True)]
            texts = (tokenizer.decode(part) for part in _stretches(row, kept))
            lines = (line for text in texts for line in _starts(text, token_set.is_supervised))
            refusing += any(is_refusal(line, openings) for line in lines)
    return RefusalCount(len(chosen), refusing)


def _starts(text: str, is_answer: bool) -> list[str]:
    return [text] if is_answer else text.splitlines()


def require_refusals(
    field: str,
    source: CalibrationConfig,
    token_set: TokenSet,
    tokenizer: Any,
    openings: Sequence[str],
) -> RefusalCount:
    """Turn down alignment data without a refusal; return what was found.

    Args:
        field: Recipe section of the data, for the message.
        source: That section.
        token_set: Its data.
        tokenizer: The tokenizer it was made with.
        openings: Openings of a refusal, at least one.

    Raises:
        DataError: No row holds a refusal.
    """
    found = count_refusals(token_set, source.num_blocks, tokenizer, openings)
    if not found.refusing:
        raise DataError(
            f"{field}.path: 0 of the {found.rows} rows used of {source.path} hold an answer that"
            f" opens with a refusal ({len(openings)} openings looked for, such as"
            f" {openings[0]!r}), so what must be kept would not be measured; add unsafe prompts"
            " with the model's own refusals, name its words in method.refusals, or set that to []"
            " to protect something else."
        )
    return found

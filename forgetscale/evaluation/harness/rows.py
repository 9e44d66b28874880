"""Which rows of a task's data are asked: all, a drawn sample, or the shortest.

Published tables often use a part of a data set; drawn here, the whole files can lie in the folder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from forgetscale.errors import DataError

SAMPLE_SEED = 42


def _wanted(value: Any, option: str, num_rows: int, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise DataError(f"{where}: metadata.forgetscale.{option} is {value!r}, expected rows > 0.")
    if value > num_rows:
        raise DataError(
            f"{where}: metadata.forgetscale.{option} asks for {value} rows, but the data hold"
            f" {num_rows}; put all rows there, or lower the number."
        )
    return value


def sampled_rows(num_rows: int, wanted: int) -> list[int]:
    """Return the rows that ``pandas.DataFrame.sample(wanted, random_state=42)`` draws, in order.

    Args:
        num_rows: Rows there are.
        wanted: Rows drawn, 1 to ``num_rows``.

    Source:
        arXiv:2512.04844 draws its 500 sentences of FLORES+ that way.
    """
    drawn = np.random.RandomState(SAMPLE_SEED).choice(num_rows, size=wanted, replace=False)
    return [int(row) for row in drawn]


def shortest_rows(lengths: Sequence[int], wanted: int) -> list[int]:
    """Return the rows of the smallest lengths, in the order of the file; of equals the first.

    Args:
        lengths: Length of each row.
        wanted: Rows kept, 1 to all.
    """
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    return sorted(order[:wanted])


def choose_rows(
    documents: Sequence[Mapping[str, Any]], options: Mapping[str, Any], tokenizer: Any, where: str
) -> list[int] | None:
    """Return the rows that ``metadata.forgetscale`` chooses, or None for all.

    Args:
        documents: Rows of the data.
        options: May hold ``sample`` (rows) or ``shortest`` (``rows`` and ``field``, whose tokens
            are counted).
        tokenizer: Counts tokens.
        where: File that holds the options, for messages.

    Raises:
        DataError: Both are given, a number is not possible, or a row lacks the field.
    """
    sample, shortest = options.get("sample"), options.get("shortest")
    if sample is not None and shortest is not None:
        raise DataError(f"{where}: metadata.forgetscale names sample and shortest; keep one.")
    if sample is not None:
        return sampled_rows(len(documents), _wanted(sample, "sample", len(documents), where))
    if shortest is None:
        return None
    if not isinstance(shortest, Mapping) or set(shortest) != {"rows", "field"}:
        raise DataError(
            f"{where}: metadata.forgetscale.shortest is {shortest!r}, expected rows and field."
        )
    wanted = _wanted(shortest["rows"], "shortest.rows", len(documents), where)
    lengths = []
    for number, row in enumerate(documents):
        text = row.get(shortest["field"])
        if not isinstance(text, str):
            raise DataError(f"{where}: row {number} of the data has no text {shortest['field']!r}.")
        lengths.append(len(tokenizer(text, add_special_tokens=False)["input_ids"]))
    return shortest_rows(lengths, wanted)

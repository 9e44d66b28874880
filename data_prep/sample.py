"""Seeded choice of documents, independent of how the input is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from data_prep.readers import Line
from data_prep.records import BadRecordError, Document
from forgetscale.data import pack_doc_id
from forgetscale.data.order import Permutation

_BLOCK = 1 << 16
_ID_SPACE = 1 << 62


def select_documents(
    lines: Iterator[tuple[int, Line]],
    *,
    max_documents: int,
    seed: int,
    read: Callable[[int, Line], Document],
    on_reject: Callable[[int, int, str], None],
) -> tuple[np.ndarray, int]:
    """Choose ``max_documents`` of the usable lines, each set of that size being equally likely.

    A line is chosen if its document id is among the smallest after a seeded permutation of all
    ids, so the choice depends on the seed and the input files alone.

    Args:
        lines: ``(file index, line)`` of the whole input.
        max_documents: Documents wanted; all are taken if there are fewer.
        seed: Any integer >= 0.
        read: Returns the document of a line of a file, or raises ``BadRecordError``.
        on_reject: Called with file index, line number and reason for each bad line.

    Returns:
        Ids of the chosen documents, sorted, and how many there were to choose from.
    """
    rank = Permutation(_ID_SPACE, f"sample:{seed}")
    chosen = np.empty(0, np.int64)
    block: list[int] = []
    num_candidates = 0
    for file_index, line in lines:
        try:
            document = read(file_index, line)
        except BadRecordError as error:
            on_reject(file_index, line.number, str(error))
            continue
        if document.messages or document.text:
            num_candidates += 1
            block.append(pack_doc_id(file_index, line.number))
        if len(block) == _BLOCK:
            chosen = _smallest(rank, np.concatenate([chosen, block]), max_documents)
            block = []
    chosen = _smallest(rank, np.concatenate([chosen, np.array(block, np.int64)]), max_documents)
    return np.sort(chosen), num_candidates


def _smallest(rank: Permutation, ids: np.ndarray, count: int) -> np.ndarray:
    ids = ids.astype(np.int64)
    return ids if len(ids) <= count else ids[np.argsort(rank(ids))[:count]]

"""Choice of documents after a first pass: no duplicates, a seeded sample."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Int64

from data_prep.engine import Source
from data_prep.ledger import Ledger
from data_prep.units import UnitResult
from forgetscale.data.duplicates import exact_duplicates, near_duplicates
from forgetscale.data.format import LINE_BITS
from forgetscale.data.order import Permutation
from forgetscale.progress import Progress

_ID_SPACE = 1 << 62


class SurveyMerger:
    """Collect what was found about each document.

    Args:
        ledger: Counts of the input.
        progress: Told how many stored bytes were seen.
    """

    def __init__(self, ledger: Ledger, progress: Progress) -> None:
        self._ledger = ledger
        self._progress = progress
        self._found: dict[str, list[np.ndarray]] = {"ids": [], "hashes": [], "signatures": []}
        self._bytes_before = 0
        self._bytes_here = 0

    def add(self, source: Source, unit: int, result: UnitResult) -> bool:
        """Take a result."""
        self._bytes_here += result.stored_bytes
        self._progress.update(self._bytes_before + self._bytes_here, source.path.name)
        self._ledger.add(source, result)
        self._found["ids"].append(result.arrays["lines"] | np.int64(source.index << LINE_BITS))
        self._found["hashes"].append(result.arrays["hashes"])
        if "signatures" in result.arrays:
            self._found["signatures"].append(result.arrays["signatures"])
        return True

    def finish_source(self, source: Source, description: dict[str, Any]) -> None:
        """Note the end of a file."""
        self._ledger.finish_source(source, description)
        self._bytes_before += description["size"]
        self._bytes_here = 0
        self._progress.update(self._bytes_before)

    def choose(
        self,
        *,
        deduplicate: str,
        near_threshold: float,
        max_documents: int | None,
        seed: int,
        num_sources: int,
    ) -> tuple[list[np.ndarray], int]:
        """Return the chosen lines of each source, sorted, and how many there were to sample from.

        Duplicates go first, then the sample is drawn from what is left.
        """
        if not self._found["ids"]:
            return [np.empty(0, np.int64) for _ in range(num_sources)], 0
        ids = np.concatenate(self._found["ids"])
        if deduplicate != "none":
            repeated = exact_duplicates(np.concatenate(self._found["hashes"]))
            self._ledger.dropped["exact_duplicate"] += int(repeated.sum())
            ids = ids[~repeated]
            if deduplicate == "near":
                signatures = np.concatenate(self._found["signatures"])[~repeated]
                close = near_duplicates(signatures, near_threshold)
                self._ledger.dropped["near_duplicate"] += int(close.sum())
                ids = ids[~close]
        num_candidates = len(ids)
        if max_documents:
            ids = sample_ids(ids, max_documents, seed)
            self._ledger.dropped["not_sampled"] += num_candidates - len(ids)
        owners, lines = ids >> LINE_BITS, ids & ((1 << LINE_BITS) - 1)
        return [lines[owners == index] for index in range(num_sources)], num_candidates


def sample_ids(ids: Int64[np.ndarray, " documents"], count: int, seed: int) -> np.ndarray:
    """Return ``count`` of the ids, sorted, each set of that size being equally likely.

    An id is chosen if it is among the smallest after a seeded permutation of all ids, so the
    choice depends on the seed and the documents alone. All are chosen if there are fewer.
    """
    if len(ids) <= count:
        return ids
    rank = Permutation(_ID_SPACE, f"sample:{seed}")
    return np.sort(ids[np.argsort(rank(ids))[:count]])

"""Duplicates among documents, decided in the order of the input: the first one stays.

Exact: equal 128-bit BLAKE2b of the text. Near: MinHash signatures (``rensa``) of 5-word shingles,
cut into bands; inside each bucket a document is a duplicate if its signature agrees with that of
the first document of the bucket in at least ``threshold`` of the positions, an estimate of the
Jaccard similarity. The result depends on the documents and their order alone.

Source:
    A. Broder, "On the resemblance and containment of documents" (1997); banding as in Leskovec,
    Rajaraman, Ullman, "Mining of Massive Datasets", chapter 3. We compare with the first document
    of a bucket only, which keeps the work linear.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt32, UInt64

from forgetscale.data.text import words_of
from forgetscale.errors import ConfigError

NUM_POSITIONS = 128
SHINGLE_WORDS = 5
_SEED = 42


def text_hash(text: str) -> bytes:
    """Return the 16 bytes that identify ``text``."""
    return hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()


def hash_array(hashes: list[bytes]) -> UInt64[np.ndarray, "documents 2"]:
    """Return hashes of 16 bytes as an array."""
    return np.frombuffer(b"".join(hashes), dtype="<u8").reshape(-1, 2)


def exact_duplicates(hashes: UInt64[np.ndarray, "documents 2"]) -> Bool[np.ndarray, " documents"]:
    """Return which documents have the hash of an earlier one."""
    order = np.lexsort((np.arange(len(hashes)), hashes[:, 1], hashes[:, 0]))
    ordered = hashes[order]
    same = np.zeros(len(hashes), bool)
    same[order[1:]] = (ordered[1:] == ordered[:-1]).all(axis=1)
    return same


def load_rensa() -> Any:
    """Import the MinHash library.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        import rensa
    except ImportError as error:
        raise ConfigError(
            "near duplicates need the package rensa; install forgetscale[prep]."
        ) from error
    return rensa


def signature(text: str) -> UInt32[np.ndarray, " positions"]:
    """Return the MinHash signature of the word shingles of ``text``."""
    words = words_of(text)
    count = max(len(words) - SHINGLE_WORDS + 1, 1)
    shingles = [" ".join(words[start : start + SHINGLE_WORDS]) for start in range(count)]
    sketch = load_rensa().RMinHash(num_perm=NUM_POSITIONS, seed=_SEED)
    sketch.update(shingles)
    return np.array(sketch.digest(), dtype=np.uint32)


def band_rows(threshold: float) -> int:
    """Return positions per band: the most that find pairs at ``threshold`` 9 times in 10."""
    for rows in (32, 16, 8, 4, 2):
        if 1 - (1 - threshold**rows) ** (NUM_POSITIONS // rows) >= 0.9:
            return rows
    return 1


def near_duplicates(
    signatures: UInt32[np.ndarray, "documents positions"], threshold: float
) -> Bool[np.ndarray, " documents"]:
    """Return which documents nearly repeat an earlier one.

    Args:
        signatures: One row a document, in order.
        threshold: Share of positions that must agree, in (0, 1].
    """
    found = np.zeros(len(signatures), bool)
    rows = band_rows(threshold)
    for start in range(0, NUM_POSITIONS if len(signatures) else 0, rows):
        band = np.ascontiguousarray(signatures[:, start : start + rows])
        keys = band.view(np.dtype((np.void, band.itemsize * rows))).reshape(-1)
        _, first, bucket = np.unique(keys, return_index=True, return_inverse=True)
        leaders = first[bucket]
        others = np.flatnonzero(leaders != np.arange(len(keys)))
        equal = signatures[others] == signatures[leaders[others]]
        found[others[equal.mean(axis=1) >= threshold]] = True
    return found


def is_held_out(
    hashes: UInt64[np.ndarray, " documents"], fraction: float, seed: int
) -> Bool[np.ndarray, " documents"]:
    """Return which documents belong to the held-out part: a seeded share of all text hashes.

    Equal texts fall on the same side.
    """
    salt = int.from_bytes(hashlib.blake2b(f"holdout:{seed}".encode(), digest_size=8).digest())
    mixed = hashes ^ np.uint64(salt)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    mixed ^= mixed >> np.uint64(31)
    return mixed < np.uint64(min(int(fraction * 2.0**64), 2**64 - 1))

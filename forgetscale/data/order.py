"""Order of rows: a permutation that needs no table.

A Feistel network with a 64-bit mixing function permutes ``0..2**bits - 1``; numbers outside the
set are permuted again until they fall inside (cycle walking). Integer arithmetic only, so the
order is the same on every machine and with every library version.
"""

from __future__ import annotations

import functools
import hashlib

import numpy as np
from jaxtyping import Int64

_NUM_ROUNDS = 8
_BLOCK = 1 << 16


class Permutation:
    """Seeded permutation of ``0..size - 1``, computed on demand.

    Args:
        size: Number of elements, 1..2**62.
        key: Any text; each gives its own permutation.

    Raises:
        ValueError: ``size`` is out of range.
    """

    def __init__(self, size: int, key: str) -> None:
        if not 1 <= size <= 1 << 62:
            raise ValueError(f"size must be in 1..2**62, got {size}")
        self._size = size
        bits = max(2, (size - 1).bit_length())
        self._left_bits, self._right_bits = bits - bits // 2, bits // 2
        digest = hashlib.blake2b(key.encode(), digest_size=8 * _NUM_ROUNDS).digest()
        self._round_keys = np.frombuffer(digest, dtype="<u8").astype(np.uint64)

    def __call__(self, positions: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        """Return the element at each of ``positions`` (each in ``0..size - 1``)."""
        values = self._permute(positions.astype(np.uint64))
        outside = values >= self._size
        while outside.any():
            values[outside] = self._permute(values[outside])
            outside = values >= self._size
        return values.astype(np.int64)

    def _permute(self, values: np.ndarray) -> np.ndarray:
        left_bits, right_bits = self._left_bits, self._right_bits
        left = values >> np.uint64(right_bits)
        right = values & np.uint64((1 << right_bits) - 1)
        for key in self._round_keys:
            left, right = right, left ^ (_mix(right, key) >> np.uint64(64 - left_bits))
            left_bits, right_bits = right_bits, left_bits
        return (left << np.uint64(right_bits)) | right


def _mix(values: np.ndarray, key: np.uint64) -> np.ndarray:
    """Return 64 well-mixed bits of ``values + key`` (finaliser of splitmix64)."""
    mixed = values + key
    mixed ^= mixed >> np.uint64(30)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed


class RowOrder:
    """Row at each global position, epoch after epoch.

    Position ``p`` belongs to epoch ``p // num_rows``. The order is a pure function of
    ``(content_hash, seed, epoch, position)``. Blocks of 65,536 positions are computed at a time
    and the last one is kept, so that starting anywhere costs the same few milliseconds.

    Args:
        num_rows: Rows of the set, >= 1.
        content_hash: Of the token set.
        seed: Any integer.
    """

    def __init__(self, num_rows: int, content_hash: str, seed: int) -> None:
        self._num_rows = num_rows
        self._name = f"{content_hash}:{seed}"
        self._cached: tuple[int, int] | None = None
        self._block = np.empty(0, np.int64)

    def rows(self, first: int, count: int) -> Int64[np.ndarray, " count"]:
        """Return the rows at global positions ``first`` to ``first + count - 1``."""
        pieces = []
        end = first + count
        while first < end:
            epoch, position = divmod(first, self._num_rows)
            block = self._get_block(epoch, position // _BLOCK)
            piece = block[position % _BLOCK : position % _BLOCK + end - first]
            pieces.append(piece)
            first += len(piece)
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate([np.empty(0, np.int64), *pieces])

    def _get_block(self, epoch: int, index: int) -> np.ndarray:
        if self._cached != (epoch, index):
            self._block = _block(self._num_rows, f"{self._name}:{epoch}", index)
            self._cached = (epoch, index)
        return self._block


@functools.lru_cache(maxsize=16)
def _block(num_rows: int, key: str, index: int) -> np.ndarray:
    """Return block ``index`` of a permutation; kept for others who walk the same order."""
    positions = np.arange(index * _BLOCK, min((index + 1) * _BLOCK, num_rows), dtype=np.int64)
    block = Permutation(num_rows, key)(positions)
    block.flags.writeable = False
    return block

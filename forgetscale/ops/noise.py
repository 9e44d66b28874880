"""Noise that belongs to a token or a weight: a function of seed and place, and of nothing else.

So it does not matter which rank draws it, in which piece, or after how many resumptions.
"""

from __future__ import annotations

import numpy as np
import torch
import xxhash
from jaxtyping import Float32, Int32, Int64
from torch import Tensor

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_BITS = 24
"""Random bits of a number: as many as fp32 holds."""


def _mix(values: np.ndarray) -> np.ndarray:
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = values ^ (values >> np.uint64(31))
    return mixed


def position_noise(
    seed: int, set_ids: Int64[Tensor, " rows"], row_ids: Int64[Tensor, " rows"], num_positions: int
) -> Float32[Tensor, "rows {num_positions}"]:
    """Return a uniform number in [0, 1) for each position of each row.

    A row has the same numbers whenever it comes.

    Args:
        seed: Any integer.
        set_ids: Which set each row is from, >= 0.
        row_ids: Row numbers in their sets, >= 0.
        num_positions: Tokens of a row, > 0.

    Source:
        SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), one stream per row.
    """
    state: np.ndarray = np.full(len(row_ids), seed % 2**64, np.uint64)
    for part in (set_ids, row_ids):
        state = _mix(state + _GOLDEN) ^ part.cpu().numpy().astype(np.uint64)
    counters = np.arange(1, num_positions + 1, dtype=np.uint64) * _GOLDEN
    bits = _mix(_mix(state + _GOLDEN)[:, None] + counters) >> np.uint64(64 - _BITS)
    return torch.from_numpy(bits.astype(np.float32) * np.float32(2.0**-_BITS))


def element_keys(seed: int, name: str, start: int, length: int) -> Int32[Tensor, " length"]:
    """Return 31 random bits for each element of a slice of a named tensor.

    The bits of an element do not depend on how the tensor is cut into slices.

    Args:
        seed: Any integer.
        name: Name of the tensor.
        start: Flat position of the first element, >= 0.
        length: Elements, >= 0.

    Source:
        SplitMix64, one stream per tensor.
    """
    state: np.ndarray = np.full(1, seed % 2**64, np.uint64)
    state = _mix(state + _GOLDEN) ^ np.uint64(xxhash.xxh3_64_intdigest(name.encode()))
    counters = np.arange(start + 1, start + length + 1, dtype=np.uint64) * _GOLDEN
    bits = _mix(_mix(state + _GOLDEN) + counters) >> np.uint64(33)
    return torch.from_numpy(bits.astype(np.int32))

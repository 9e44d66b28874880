"""Noise that belongs to a token: a function of seed, set, row and place, and of nothing else.

So it does not matter which rank draws it, in which micro-batch, or after how many resumptions.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float32, Int64
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

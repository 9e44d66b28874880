"""A key-value cache of slots: every row at a position of its own.

Caches of ``transformers`` put the new token of all rows at one position. Here row r is written at
its own position, so that a slot can begin another dialogue while its neighbours go on.

Shape letters: S slots, H key-value heads, L tokens, D head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

_BUCKET = 64
"""The attended length is a multiple of this, so that what lies behind a row's end is masked zeros
in whole vectors and does not change its sums."""


class _Place:
    """Where the next forward pass writes and how far it looks."""

    def __init__(self, num_slots: int, max_tokens: int) -> None:
        self.num_slots = num_slots
        self.size = -(-max_tokens // _BUCKET) * _BUCKET
        self.rows = torch.arange(num_slots)
        self.positions = torch.zeros(num_slots, dtype=torch.int64)
        self.length = _BUCKET
        self.prefill_row: int | None = None


class SlotLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Keys and values of one layer."""

    is_sliding = False

    def __init__(self, place: _Place) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._place = place

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make room for all slots."""
        place = self._place
        shape = (place.num_slots, key_states.shape[1], place.size)
        self.keys = key_states.new_zeros((*shape, key_states.shape[3]))
        self.values = value_states.new_zeros((*shape, value_states.shape[3]))
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write one token of every row, or the beginning of one row; return what is looked at."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self.held()
        place = self._place
        if place.prefill_row is not None:
            count = key_states.shape[2]
            keys[place.prefill_row, :, :count] = key_states[0]
            values[place.prefill_row, :, :count] = value_states[0]
            return key_states, value_states
        keys[place.rows, :, place.positions] = key_states[:, :, 0]
        values[place.rows, :, place.positions] = value_states[:, :, 0]
        return keys[:, :, : place.length], values[:, :, : place.length]

    def held(self) -> tuple[Tensor, Tensor]:
        """Return keys and values of all slots, ``[S, H, L, D]``."""
        assert self.keys is not None and self.values is not None
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many keys a mask has, and where they begin."""
        return self._place.length, 0

    def get_seq_length(self) -> int:
        """Return 0: positions are given with each call."""
        return 0

    def get_max_length(self) -> int:
        """Return the tokens a slot can hold."""
        return self._place.size


class SlotCache(Cache):
    """The cache of all layers.

    Args:
        num_layers: Decoder layers, > 0.
        num_slots: Rows of every forward pass, > 0.
        max_tokens: Tokens a slot can hold, > 0.
        device: Where masks are made.
        dtype: Type of masks: the model's.
    """

    def __init__(
        self, num_layers: int, num_slots: int, max_tokens: int, device: Any, dtype: torch.dtype
    ) -> None:
        self.place = _Place(num_slots, max_tokens)
        self.place.rows = self.place.rows.to(device)
        self._device, self._dtype = device, dtype
        self._own = [SlotLayer(self.place) for _ in range(num_layers)]
        super().__init__(layers=list(self._own))

    def begin_step(self, positions: list[int]) -> tuple[Tensor, Tensor]:
        """Say where each slot's token stands; return position ids and mask of the pass.

        Args:
            positions: Position of the new token of each slot; 0 for idle ones.
        """
        place = self.place
        place.prefill_row = None
        place.positions = torch.tensor(positions, device=self._device)
        place.length = -(-(max(positions) + 1) // _BUCKET) * _BUCKET
        keys = torch.arange(place.length, device=self._device)
        hidden = keys[None, :] > place.positions[:, None]
        mask = torch.zeros(hidden.shape, dtype=self._dtype, device=self._device)
        mask.masked_fill_(hidden, torch.finfo(self._dtype).min)
        return place.positions[:, None], mask[:, None, None, :]

    def begin_prefill(self, slot: int, count: int) -> tuple[Tensor, Tensor]:
        """Say that the next pass writes the first ``count`` tokens of ``slot``."""
        self.place.prefill_row = slot
        self.place.length = count
        positions = torch.arange(count, device=self._device)
        hidden = positions[None, :] > positions[:, None]
        mask = torch.zeros(hidden.shape, dtype=self._dtype, device=self._device)
        mask.masked_fill_(hidden, torch.finfo(self._dtype).min)
        return positions[None, :], mask[None, None]

    def copy_out(self, slot: int, count: int) -> list[tuple[Tensor, Tensor]]:
        """Return copies of the first ``count`` tokens of a slot."""
        return [
            (keys[slot, :, :count].clone(), values[slot, :, :count].clone())
            for keys, values in (layer.held() for layer in self._own)
        ]

    def copy_in(self, slot: int, parts: list[tuple[Tensor, Tensor]]) -> None:
        """Write what ``copy_out`` returned into another slot."""
        for layer, (keys, values) in zip(self._own, parts, strict=True):
            held_keys, held_values = layer.held()
            held_keys[slot, :, : keys.shape[1]] = keys
            held_values[slot, :, : values.shape[1]] = values

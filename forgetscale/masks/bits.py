"""Frozen elements as bits: one bit per element, never a byte.

Bit ``o & 7`` of byte ``o >> 3`` belongs to element ``o`` of the flattened tensor; 1 means frozen.
Bits after the last element are 0.

Shape letters: S elements of a slice, N elements of the tensor, K bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, UInt8
from torch import Tensor

CHUNK_BYTES = 1 << 18


def num_bytes(numel: int) -> int:
    """Return the bytes that hold one bit for each of ``numel`` elements."""
    return -(-numel // 8)


def _powers(device: torch.device) -> Tensor:
    return torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=device)


def pack_slice(
    frozen: Bool[Tensor, " S"], start: int, numel: int, out: UInt8[Tensor, " K"] | None = None
) -> UInt8[Tensor, " K"]:
    """Write a slice's bits into the bytes of the whole tensor; the sum over ranks is the plan.

    Slices of different ranks touch different bits, so a byte that a border cuts adds up too.

    Args:
        frozen: True where an element of the slice is frozen.
        start: First element of the slice in the flattened tensor.
        numel: Elements of the whole tensor.
        out: Zeroed bytes to write into; None makes them.

    Returns:
        ``[ceil(numel / 8)]`` bytes, zero outside the slice.
    """
    if out is None:
        out = torch.zeros(num_bytes(numel), dtype=torch.uint8, device=frozen.device)
    powers = _powers(frozen.device)
    shift = start % 8
    head = min(-start % 8, frozen.numel())
    if head:
        out[start // 8] += (frozen[:head] * powers[shift : shift + head]).sum(dtype=torch.uint8)
    first, end = (start + head) // 8, (start + frozen.numel()) // 8
    body = frozen[head:]
    for low in range(0, end - first, CHUNK_BYTES):
        high = min(low + CHUNK_BYTES, end - first)
        part = body[8 * low : 8 * high].view(-1, 8)
        out[first + low : first + high] = (part * powers).sum(1, dtype=torch.uint8)
    tail = body[8 * max(end - first, 0) :]
    if tail.numel():
        out[end] += (tail * powers[: tail.numel()]).sum(dtype=torch.uint8)
    return out


def unpack_bits(bits: UInt8[Tensor, " K"], first: int, length: int) -> Bool[Tensor, " S"]:
    """Return ``length`` bits from bit ``first`` on as booleans.

    Args:
        bits: Packed bits.
        first: First bit wanted, >= 0.
        length: Number of bits wanted.
    """
    low, high = first // 8, num_bytes(first + length)
    wide = (bits[low:high, None] & _powers(bits.device)) != 0
    return wide.reshape(-1)[first - 8 * low : first - 8 * low + length]


def count_bits(bits: UInt8[Tensor, " K"]) -> int:
    """Return how many bits are 1."""
    total = 0
    for part in torch.split(bits, CHUNK_BYTES):
        total += int(((part[:, None] & _powers(bits.device)) != 0).sum())
    return total


@dataclass(frozen=True, slots=True)
class ElementMask:
    """The bits of one slice of one parameter; unpacked a bounded part at a time.

    Args:
        length: Elements in the slice, padding excluded.
        offset: Bit of the slice's first element in ``bits``, 0..7.
        bits: Bytes that hold the slice's bits (for a plan, a view of its mapped file).
    """

    length: int
    offset: int
    bits: UInt8[Tensor, " K"]
    _copies: dict[torch.device, Tensor] = field(default_factory=dict)

    @classmethod
    def build(cls, start: int, length: int, bits: UInt8[Tensor, " K"]) -> ElementMask:
        """Take the bits of a slice from those of the whole tensor.

        Args:
            start: First element of the slice in the flattened parameter.
            length: Elements in the slice.
            bits: Bits of the whole parameter.
        """
        return cls(length, start % 8, bits[start // 8 : num_bytes(start + length)])

    def _on(self, device: torch.device) -> Tensor:
        if device == self.bits.device:
            return self.bits
        if device not in self._copies:
            self._copies[device] = self.bits.to(device)
        return self._copies[device]

    def _pieces(self, flat: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        bits = self._on(flat.device)
        for low in range(0, self.length, 8 * CHUNK_BYTES):
            high = min(low + 8 * CHUNK_BYTES, self.length)
            yield flat[low:high], unpack_bits(bits, self.offset + low, high - low)

    def zero_frozen_(self, grad: Tensor) -> None:
        """Zero frozen elements of a gradient slice in place; a NaN there stays and is noticed."""
        for piece, frozen in self._pieces(grad):
            piece.mul_(~frozen)

    def decay_(self, param: Tensor, decay: float) -> None:
        """Apply ``w <- w * (1 - decay)`` to elements that may change; frozen bits stay as they are.

        Args:
            param: Master weights of the slice, fp32, changed in place.
            decay: Learning rate times weight decay, >= 0.
        """
        if decay == 0.0:
            return
        for piece, frozen in self._pieces(param):
            piece.copy_(torch.where(frozen, piece, piece * (1.0 - decay)))

    def frozen_elements(self, flat: Tensor) -> Tensor:
        """Return a copy of the frozen elements of a slice in their order."""
        return torch.cat([flat[:0], *(piece[frozen] for piece, frozen in self._pieces(flat))])

    def put_frozen_(self, flat: Tensor, values: Tensor) -> None:
        """Write what ``frozen_elements`` returned back to its places.

        Args:
            flat: The slice, changed in place.
            values: One value per frozen element, in their order.
        """
        first = 0
        for piece, frozen in self._pieces(flat):
            count = int(frozen.sum())
            piece[frozen] = values[first : first + count]
            first += count

    def num_frozen(self) -> int:
        """Return how many elements of the slice are frozen."""
        parts = self._pieces(torch.empty(self.length, dtype=torch.bool))
        return sum(int(frozen.sum()) for _, frozen in parts)

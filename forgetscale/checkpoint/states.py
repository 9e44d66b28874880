"""Masters and moments on disk: one safetensors file a rank, in names of the source model.

A slice is stored with the place it has in its parameter, so a checkpoint can be read at any other
number of ranks and under either layout of the freeze plan. What the plan freezes is not stored:
its bits are the source model's, its moments zero. The files are not pickles; nothing in them runs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from forgetscale.errors import CheckpointError
from forgetscale.masks import FreezePlan, Piece, compact_layout
from forgetscale.zero3 import STATES, Slice, ZeroEngine

HEADER_KEY = "forgetscale"
WHOLE = "whole"
_TYPE_NAMES = {torch.float32: "F32"}


def states_file(rank: int, size: int) -> str:
    """Return the name of a rank's file."""
    return f"states-{rank:05d}-of-{size:05d}.safetensors"


def states_head(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return what stands before the tensors in a safetensors file.

    The library's own writer copies all tensors first: at 13B that is another 89 GB.

    Args:
        tensors: fp32 tensors on any device.
        metadata: Strings for the header.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _TYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    head = json.dumps(header, sort_keys=True).encode()
    head += b" " * (-len(head) % 8)
    return len(head).to_bytes(8, "little") + head


def _held(engine: ZeroEngine, item: Slice) -> str:
    piece = engine.layout.pieces.get(item.name)
    return WHOLE if piece is None else piece.axis


def live_states(engine: ZeroEngine) -> dict[str, Tensor]:
    """Return this rank's masters and moments by name in the file, as views of the live tensors."""
    found: dict[str, Tensor] = {}
    for item, states in _trained(engine):
        name = engine.layout.matrix_of(item.name)
        found |= {f"{kind}/{name}": values for kind, values in states.items()}
    return found


def states_chunks(engine: ZeroEngine, tensors: Mapping[str, Tensor]) -> list[bytes | Tensor]:
    """Return this rank's file of states as what is to be written one after the other.

    Args:
        engine: The model.
        tensors: ``live_states``, or copies of them by the same names.
    """
    world = engine.world
    slices: dict[str, Any] = {}
    for item, _ in _trained(engine):
        name = engine.layout.matrix_of(item.name)
        slices[name] = {"start": item.start, "held": _held(engine, item)}
    header = {
        "rank": world.rank,
        "size": world.size,
        "optimizer_steps": engine.shards.optimizer_steps,
        "slices": slices,
    }
    head = states_head(tensors, {HEADER_KEY: json.dumps(header, sort_keys=True)})
    return [head, *tensors.values()]


class SavedStates:
    """The states of all ranks of one verified checkpoint.

    Args:
        directory: Checkpoint folder.
        size: Ranks that wrote it.

    Raises:
        CheckpointError: A file is missing or is not what ``states_chunks`` describes.
    """

    def __init__(self, directory: Path, size: int) -> None:
        self._directory = directory
        self._files: list[Any] = []
        self.optimizer_steps = 0
        self._parts: dict[str, list[tuple[int, int, int]]] = {}
        self.held: dict[str, str] = {}
        for rank in range(size):
            path = directory / states_file(rank, size)
            try:
                handle: Any = safetensors.safe_open(path, "pt")
                header = json.loads(handle.metadata()[HEADER_KEY])
            except (OSError, safetensors.SafetensorError, KeyError, TypeError) as error:
                raise CheckpointError(
                    f"{path} cannot be read as a rank's states ({error!r}); the checkpoint was made"
                    " by another version of ForgetScale, finish its run with that version."
                ) from error
            self._files.append(handle)
            self.optimizer_steps = int(header["optimizer_steps"])
            for name, place in header["slices"].items():
                (length,) = handle.get_slice(f"{STATES[0]}/{name}").get_shape()
                self._parts.setdefault(name, []).append((int(place["start"]), length, rank))
                self.held[name] = place["held"]

    def read(self, kind: str, name: str, start: int, length: int) -> Tensor:
        """Return elements ``start .. start + length`` of what is stored of a parameter."""
        found = torch.empty(length, dtype=torch.float32)
        done = 0
        for first, count, rank in self._parts[name]:
            low, high = max(start, first), min(start + length, first + count)
            if low < high:
                view = self._files[rank].get_slice(f"{kind}/{name}")
                found[low - start : high - start] = view[low - first : high - first]
                done += high - low
        if done != length:
            raise CheckpointError(
                f"{self._directory}: {name} has {done} of {length} elements from {start} on; the"
                " checkpoint does not fit this model."
            )
        return found


def _saved_piece(plan: FreezePlan | None, name: str, shape: tuple[int, ...], axis: str) -> Piece:
    assert plan is not None, "cut matrices come from a plan"
    by = {axis: [name]}
    layout = compact_layout(plan, {name: shape}, by.get("column", []), by.get("row", []))
    return next(piece for piece in layout.pieces.values() if piece.trainable)


def _values(
    saved: SavedStates, kind: str, item: Slice, engine: ZeroEngine, plan: FreezePlan | None
) -> Tensor:
    name = engine.layout.matrix_of(item.name)
    piece = engine.layout.pieces.get(item.name)
    if name not in saved.held:
        raise CheckpointError(
            f"the checkpoint holds no states of {name}, which this run trains; it was made with"
            " another freeze plan or model."
        )
    held = saved.held[name]
    if held == _held(engine, item):
        return saved.read(kind, name, item.start, item.length)
    if piece is not None:
        whole = saved.read(kind, name, 0, math.prod(piece.shape)).view(piece.shape)
        return piece.take_slice(whole, item.start, item.length)
    stored = _saved_piece(plan, name, item.shape, held)
    part = saved.read(kind, name, 0, math.prod(stored.stored_shape)).view(stored.stored_shape)
    whole, moves = torch.zeros(item.shape), torch.zeros(item.shape, dtype=torch.bool)
    stored.put_(whole, part)
    stored.put_(moves, torch.ones(stored.stored_shape, dtype=torch.bool))
    mine = slice(item.start, item.start + item.length)
    kept = engine.shards.master(item).cpu() if kind == "master" else torch.zeros(item.length)
    return torch.where(moves.view(-1)[mine], whole.view(-1)[mine], kept)


def _trained(engine: ZeroEngine) -> Iterator[tuple[Slice, dict[str, Tensor]]]:
    for item in engine.shards.slices:
        states = engine.shards.states(item)
        if states and item.length:
            yield item, states


def load_states(directory: Path, size: int, engine: ZeroEngine, plan: FreezePlan | None) -> None:
    """Load masters and moments into an engine that holds the source model's weights.

    Every rank reads what it needs from the files of all. Reads one parameter at a time.

    Args:
        directory: Checkpoint folder, verified.
        size: Ranks that wrote it; need not be this run's.
        engine: The model.
        plan: Freeze plan in names of the source model.

    Raises:
        CheckpointError: The files do not fit the model or the plan.

    Collective: every rank must call it.
    """
    error: CheckpointError | None = None
    try:
        saved = SavedStates(directory, size)
        for item, states in _trained(engine):
            found = {kind: _values(saved, kind, item, engine, plan) for kind in STATES}
            for kind, values in found.items():
                states[kind].copy_(values)
        engine.shards.optimizer_steps = saved.optimizer_steps
    except CheckpointError as wrong:
        error = wrong
    engine.world.agree(error)
    engine.shards.write_params()

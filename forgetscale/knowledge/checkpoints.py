"""A training checkpoint read as a model: ranks' slices by (rank, offset), nothing gathered.

A range of a parameter is taken from the slices that overlap it, rounded to the run's working type:
the bits that ``forgetscale export`` writes. What the run did not train is the source model's. Of a
matrix that was cut by columns, one is held at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from forgetscale.artifact import read_manifest
from forgetscale.checkpoint.states import WHOLE, SavedStates
from forgetscale.checkpoint.store import KIND
from forgetscale.errors import DataError
from forgetscale.masks import Piece, compact_layout, load_plan
from forgetscale.models.raw import FLOAT_NAMES, RawFolder

_TYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def is_checkpoint(path: Path) -> bool:
    """Say whether a folder is a training checkpoint of a ForgetScale run."""
    return any(path.glob("states-*-of-*.safetensors")) if path.is_dir() else False


class ZeroCheckpoint:
    """Trained weights in a checkpoint, in the names and shapes of the source model.

    Args:
        directory: ``RUN/checkpoints/step-...``; the freeze plan is looked for in ``RUN/plan``.
        source: The source model of the run.

    Raises:
        DataError: It is no valid checkpoint, or belongs to another model.
        CheckpointError: A rank's file is damaged.
    """

    def __init__(self, directory: Path, source: RawFolder) -> None:
        self.directory = directory
        self.source = source
        self.manifest = read_manifest(directory, KIND)
        recipe: Mapping[str, Any] = self.manifest["made_by"].get("recipe") or {}
        self.dtype = _TYPES[recipe["model"]["dtype"]]
        self._saved = SavedStates(directory, int(self.manifest["payload"]["world_size"]))
        code, size = FLOAT_NAMES[self.dtype], self.dtype.itemsize
        self.tensors = {
            name: tensor
            if tensor.dtype is None
            else replace(tensor, code=code, num_bytes=tensor.numel * size)
            for name, tensor in source.tensors.items()
        }
        for name in self._saved.held:
            if name not in source.tensors:
                raise DataError(
                    f"{directory} trains {name}, which {source.directory} does not hold; --source"
                    " must be the model the run started from."
                )
        self._pieces = self._read_pieces()
        self._kept: tuple[str, Tensor] | None = None

    def _read_pieces(self) -> dict[str, Piece]:
        """Return the trainable part of every matrix that was stored cut."""
        cut = {name: axis for name, axis in self._saved.held.items() if axis != WHOLE}
        if not cut:
            return {}
        plan = load_plan(self.directory.parent.parent / "plan")
        shapes = {name: self.source.tensors[name].shape for name in cut}
        layout = compact_layout(
            plan,
            shapes,
            [name for name, axis in cut.items() if axis == "column"],
            [name for name, axis in cut.items() if axis == "row"],
        )
        pieces = {piece.matrix: piece for piece in layout.pieces.values() if piece.trainable}
        for name, axis in cut.items():
            if name not in pieces or pieces[name].axis != axis:
                raise DataError(
                    f"{self.directory} stores {name} by {axis}s, but the plan beside it does not"
                    " cut it so; keep the plan of a run with its checkpoints."
                )
        return pieces

    def read(self, name: str, start: int, length: int) -> Tensor:
        """Return elements ``start .. start + length`` in the run's working type."""
        if name not in self._saved.held:
            return self.source.read(name, start, length).to(self.dtype, copy=True)
        piece = self._pieces.get(name)
        if piece is None:
            return self._saved.read("master", name, start, length).to(self.dtype)
        width = piece.shape[1]
        low, high = start // width, -(-(start + length) // width)
        rows = self.source.read(name, low * width, (high - low) * width).to(self.dtype)
        rows = rows.view(high - low, width).clone()
        if piece.axis == "row":
            self._put_rows(rows, piece, low, high)
        else:
            self._put_columns(rows, piece, low, high)
        return rows.view(-1)[start - low * width :][:length]

    def _put_rows(self, rows: Tensor, piece: Piece, low: int, high: int) -> None:
        first, last = torch.searchsorted(piece.index, torch.tensor([low, high])).tolist()
        if last > first:
            width = piece.shape[1]
            stored = self._saved.read("master", piece.matrix, first * width, (last - first) * width)
            rows[piece.index[first:last] - low] = stored.view(-1, width).to(self.dtype)

    def _put_columns(self, rows: Tensor, piece: Piece, low: int, high: int) -> None:
        # Stored as [P, O], so that a few rows lie all over it: the matrix last read is kept.
        if self._kept is None or self._kept[0] != piece.matrix:
            count, height = piece.stored_shape
            stored = self._saved.read("master", piece.matrix, 0, count * height)
            whole = stored.view(count, height).to(self.dtype).t().contiguous()
            self._kept = (piece.matrix, whole)
        rows[:, piece.index] = self._kept[1][low:high]

    def read_bytes(self, name: str, start: int, length: int) -> Tensor:
        """Return bytes of a tensor that is passed through: integers are the source model's."""
        dtype = self.tensors[name].dtype
        if dtype is None:
            return self.source.read_bytes(name, start, length)
        size = dtype.itemsize
        assert start % size == 0 and length % size == 0, (start, length)
        return self.read(name, start // size, length // size).contiguous().view(torch.uint8)

    def close(self) -> None:
        """Nothing to close: the ranks' files are mapped."""

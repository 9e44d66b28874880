"""The compact layout of a freeze plan: matrices cut into a frozen and a trainable part.

A masked run keeps whole matrices trainable and throws away gradients and moments of what may not
move. Where a plan names whole columns or whole rows, the matrix is stored as two parameters
instead: ``frozen`` without gradient or optimizer state, and ``trainable``. This module knows which
elements each part holds; ``forgetscale.models.compact`` computes with them.

Shape letters: O out features (rows), I in features (columns), P columns or rows of one part.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from jaxtyping import Int64, Shaped
from torch import Tensor

from forgetscale.masks.adapters import AdapterPair, factor_shapes
from forgetscale.masks.plan import FreezePlan

Axis = Literal["column", "row"]
FROZEN, TRAINABLE = "frozen", "trainable"


@dataclass(frozen=True, slots=True)
class Piece:
    """Some columns or rows of one matrix, stored as a parameter of its own.

    Columns are stored as rows, ``[P, O]``: writing a column back into the assembled ``[I, O]``
    weight is then one contiguous copy (``launch/bench/compact_matmul.py`` has the losers).

    Args:
        matrix: Name of the whole matrix in the source model.
        shape: Its shape ``[O, I]``.
        axis: ``column`` or ``row``.
        index: Sorted positions along the axis that this part holds.
        trainable: False for the part that never moves.
    """

    matrix: str
    shape: tuple[int, int]
    axis: Axis
    index: Int64[Tensor, " P"]
    trainable: bool

    @property
    def stored_shape(self) -> tuple[int, int]:
        """Shape of the parameter: ``[P, O]`` for columns, ``[P, I]`` for rows."""
        return (self.index.numel(), self.shape[0 if self.axis == "column" else 1])

    def take(self, whole: Shaped[Tensor, "O I"]) -> Shaped[Tensor, "P other"]:
        """Return this part of a whole matrix, in its stored shape."""
        index = self.index.to(whole.device)
        if self.axis == "row":
            return whole.index_select(0, index)
        return whole.index_select(1, index).t().contiguous()

    def take_slice(
        self, whole: Shaped[Tensor, "O I"], start: int, length: int
    ) -> Shaped[Tensor, " length"]:
        """Return elements ``start .. start + length`` of the flattened part.

        Only the columns or rows of that range are read, so ``whole`` may be memory-mapped.
        """
        width = self.stored_shape[1]
        low, high = start // width, -(-(start + length) // width)
        near = replace(self, index=self.index[low:high])
        return near.take(whole).reshape(-1)[start - low * width :][:length]

    def put_(self, whole: Shaped[Tensor, "O I"], part: Shaped[Tensor, "P other"]) -> None:
        """Write this part into a whole matrix in place."""
        index = self.index.to(whole.device)
        if self.axis == "row":
            whole.index_copy_(0, index, part)
        else:
            whole.t().index_copy_(0, index, part)


@dataclass(frozen=True, slots=True)
class CompactLayout:
    """How a freeze plan is stored: parts by parameter name, and masks for everything else.

    Args:
        pieces: Parameter name -> part it holds. Names are those of the built model.
        plan: What the masks still have to freeze, in names of the built model: vectors, and
            matrices that are not cut. Frozen parts are whole parameters in it.
        adapters: Matrix name -> low-rank factors beside it; then every weight of the source model
            is whole in the plan.
    """

    pieces: Mapping[str, Piece]
    plan: FreezePlan
    adapters: Mapping[str, AdapterPair] = field(default_factory=dict)

    def factors(self) -> dict[str, tuple[int, int]]:
        """Return name -> shape of the parameters that the source model does not have."""
        return factor_shapes(self.adapters)

    def matrices(self) -> dict[str, tuple[str, str]]:
        """Return matrix name -> names of its frozen and its trainable part."""
        found: dict[str, dict[bool, str]] = {}
        for name, piece in self.pieces.items():
            found.setdefault(piece.matrix, {})[piece.trainable] = name
        return {matrix: (names[False], names[True]) for matrix, names in found.items()}

    def matrix_of(self, name: str) -> str:
        """Return the source model's name for a parameter of the built model."""
        return self.pieces[name].matrix if name in self.pieces else name


def _cut(name: str, shape: tuple[int, int], axis: Axis, frozen: Tensor) -> dict[str, Piece] | None:
    size = shape[1 if axis == "column" else 0]
    if not 0 < frozen.numel() < size:
        return None
    moves = torch.ones(size, dtype=torch.bool)
    moves[frozen] = False
    module = name.rpartition(".")[0]
    frozen = frozen.to(torch.int64).cpu()
    trainable = moves.nonzero().flatten()
    return {
        f"{module}.{FROZEN}": Piece(name, shape, axis, frozen, False),
        f"{module}.{TRAINABLE}": Piece(name, shape, axis, trainable, True),
    }


def compact_layout(
    plan: FreezePlan,
    shapes: Mapping[str, tuple[int, ...]],
    by_column: Iterable[str],
    by_row: Iterable[str],
) -> CompactLayout:
    """Cut every matrix that a plan freezes by whole columns or by whole rows.

    Matrices frozen both ways, not at all, or whole stay as they are, and so do vectors.

    Args:
        plan: Freeze plan in names of the source model.
        shapes: Parameter shapes of the source model.
        by_column: Matrices whose module can be cut by columns.
        by_row: Matrices whose module can be cut by rows.
    """
    pieces: dict[str, Piece] = {}
    columns, rows = dict(plan.columns), dict(plan.rows)
    sources: tuple[tuple[Axis, Iterable[str], dict[str, Tensor], dict[str, Tensor]], ...] = (
        ("column", by_column, columns, rows),
        ("row", by_row, rows, columns),
    )
    for axis, names, here, other in sources:
        for name in names:
            if name not in here or name in other or name in plan.whole:
                continue
            height, width = shapes[name]
            cut = _cut(name, (height, width), axis, here[name])
            if cut is not None:
                pieces |= cut
                del here[name]
    whole = plan.whole | {name for name, piece in pieces.items() if not piece.trainable}
    return CompactLayout(pieces, replace(plan, columns=columns, rows=rows, whole=whole))

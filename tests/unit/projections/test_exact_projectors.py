"""What an exact projector makes of the geodesic term, and what single precision leaves of one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from forgetscale.ops.penalties import geodesic_overlap
from forgetscale.projections import Complement, LeftFrame, Onto, Place, RightFrame, VectorFrame

D = torch.float64


def orthonormal(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    found = torch.linalg.qr(torch.randn(rows, columns, dtype=D, generator=generator))[0]
    return found.to(dtype)


def make(reading: str, dtype: torch.dtype, shape: tuple[int, int], m: int) -> Onto:
    place = Place.whole(shape)
    if reading == "left":
        return Onto(LeftFrame(place, orthonormal(shape[0], m, dtype)))
    if reading == "right":
        whole = torch.zeros(0, dtype=torch.long)
        return Onto(RightFrame(place, orthonormal(shape[1], m, dtype), whole))
    return Onto(VectorFrame(place, orthonormal(shape[0] * shape[1], m, dtype)))


def draw(shape: tuple[int, int], seed: int, dtype: torch.dtype = D) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape[0] * shape[1], dtype=D, generator=generator).to(dtype)


@pytest.mark.parametrize("reading", ["left", "right", "vector"])
def test_the_geodesic_term_is_flat_under_an_exact_projector(reading: str):
    shape = (7, 5)
    projector = make(reading, D, shape, 3)
    diagonal = torch.linspace(0.1, 3, 35, dtype=D)

    def overlap(x: Tensor, metric: Tensor | None) -> float:
        inside = projector.apply(x, projector.sketch(x))
        return float(geodesic_overlap(inside, x - inside, metric))

    def slopes(metric: Tensor | None) -> Tensor:
        x, eye = draw(shape, 1), 1e-5 * torch.eye(35, dtype=D)
        found = [(overlap(x + e, metric) - overlap(x - e, metric)) / 2e-5 for e in eye]
        return torch.tensor(found, dtype=D)

    assert overlap(draw(shape, 1), None) < 1e-10
    assert float(slopes(None).abs().max()) < 1e-10
    # An inner product that does not commute with the projector is another matter.
    assert float(slopes(diagonal).abs().max()) > 1e-5


@pytest.mark.parametrize("reading", ["left", "right", "vector"])
def test_single_precision(reading: str):
    shape, m = (96, 80), 32
    projector = make(reading, torch.float32, shape, m)
    x = draw(shape, 2, torch.float32)

    def apply(values: Tensor, by: Onto | Complement) -> Tensor:
        return by.apply(values, by.sketch(values))

    inside, outside = apply(x, projector), apply(x, Complement(projector))
    assert float((apply(inside, projector) - inside).norm() / inside.norm()) < 1e-5
    assert torch.equal(outside, x - inside)
    assert float(apply(outside, projector).norm() / x.norm()) < 1e-5
    # Half precision is too coarse for directions, so they are kept in fp32.
    coarse = Onto(LeftFrame(Place.whole(shape), orthonormal(96, m, torch.bfloat16).float()))
    if reading == "left":
        once = apply(x, coarse)
        assert float((apply(once, coarse) - once).norm() / once.norm()) > 1e-4

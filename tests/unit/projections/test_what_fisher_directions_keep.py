"""Directions measured on X keep the answers on X while Y is learned; others of that number do not.

Two dense layers in fp64. X lies near a plane, Y beside it and fills the space; Y is learned until a
fixed share of its loss is left, so that what is compared has learned equally much.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from forgetscale.ops.fisher import low_rank_basis
from forgetscale.projections import (
    Anchor,
    FrameMetric,
    Guard,
    Onto,
    Place,
    VectorFrame,
    add_penalty_,
    project_,
)

D = torch.float64
IN, HIDDEN, CLASSES, RANK = 6, 10, 4, 12
STRENGTH, SHARE_LEFT = 30.0, 0.25
Weights = dict[str, Tensor]
Bases = dict[str, tuple[Tensor, Tensor]]


def log_probs(weights: Weights, inputs: Tensor) -> Tensor:
    return (torch.tanh(inputs @ weights["a"].t()) @ weights["b"].t()).log_softmax(-1)


class World(NamedTuple):
    source: Weights
    x: Tensor
    y: Tensor
    answers: Tensor
    """Of a model somewhat beside the source one, on Y."""
    fisher: Bases
    other: Bases
    """As many directions of the same weights, drawn at random."""


def make_world(seed: int) -> World:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=D, generator=generator)

    source = {"a": 0.8 * draw(HIDDEN, IN), "b": draw(CLASSES, HIDDEN)}
    x = draw(64, IN) * torch.tensor([1.5, 1.5, 0.1, 0.1, 0.1, 0.1], dtype=D)
    y = draw(48, IN) * torch.tensor([0.7, 0.7, 1.0, 1.0, 1.0, 1.0], dtype=D)
    teacher = {name: weight + 0.4 * draw(*weight.shape) for name, weight in source.items()}
    scores: dict[str, list[Tensor]] = {name: [] for name in source}
    drawn = torch.multinomial(log_probs(source, x).exp(), 8, replacement=True, generator=generator)
    for row, labels in zip(x, drawn.tolist(), strict=True):
        for label in labels:
            leaves = {name: weight.clone().requires_grad_() for name, weight in source.items()}
            found = torch.autograd.grad(log_probs(leaves, row)[label], list(leaves.values()))
            for name, gradient in zip(leaves, found, strict=True):
                scores[name].append(gradient)
    fisher = {name: low_rank_basis(torch.stack(rows), RANK) for name, rows in scores.items()}
    other = {
        name: (torch.linalg.qr(draw(len(basis), RANK))[0], values)
        for name, (basis, values) in fisher.items()
    }
    return World(source, x, y, log_probs(teacher, y).exp(), fisher, other)


def make_guards(source: Weights, bases: Bases) -> list[Guard]:
    guards = []
    for name, (basis, values) in bases.items():
        place = Place.whole(tuple(source[name].shape))
        frame = VectorFrame(place, basis)
        metric = FrameMetric(frame, STRENGTH * values)
        guards.append(Guard(name, place, Anchor(source[name].flatten()), metric, Onto(frame)))
    return guards


def divergence(world: World, weights: Weights, inputs: Tensor, target: Tensor) -> Tensor:
    return (target * (target.log() - log_probs(weights, inputs))).sum(-1).mean()


def tune(world: World, bases: Bases, action: str) -> float:
    """Learn Y from the source weights; return the divergence from the source model on X."""
    weights = {name: value.clone().requires_grad_() for name, value in world.source.items()}
    guards = make_guards(world.source, bases)
    slices = {name: weight.detach().view(-1) for name, weight in weights.items()}
    optimizer = torch.optim.Adam(weights.values(), lr=0.01)
    first = float(divergence(world, world.source, world.y, world.answers))
    for _ in range(300):
        loss = divergence(world, weights, world.y, world.answers)
        if loss.item() <= SHARE_LEFT * first:
            break
        optimizer.zero_grad()
        loss.backward()
        if action == "penalty":
            grads = {name: weight.grad.view(-1) for name, weight in weights.items()}
            add_penalty_(guards, slices, grads, lambda total: total)
        optimizer.step()
        if action == "project_update":
            project_(guards, slices, lambda total: total)
    assert loss.item() == pytest.approx(SHARE_LEFT * first, rel=0.2), "Y was not learned"
    with torch.no_grad():
        return float(divergence(world, weights, world.x, log_probs(world.source, world.x).exp()))


@pytest.mark.parametrize("action", ["penalty", "project_update"])
def test_x_is_kept_at_equal_loss_on_y(action: str):
    ratios = []
    for seed in range(4):
        world = make_world(seed)
        plain = tune(world, {}, action)
        assert plain > 0.02, "learning Y costs X"
        ratios.append([tune(world, bases, action) / plain for bases in (world.fisher, world.other)])
        assert ratios[-1][0] < 0.5 * min(1.0, ratios[-1][1]), seed
    measured, drawn = torch.tensor(ratios).mean(0).tolist()
    # Seen: 0.06 and 0.11 of plain tuning's divergence, against 0.78 and 1.01.
    assert measured < 0.2
    assert drawn > 0.7

"""SPD, MoFO and restoration while training against dense fp64 versions written from their sources.

Whole tensors, a full sort for every choice, Adam written out; nothing of the project's masks,
thresholds or slices.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from tests.distributed.compare import assert_same_weights
from tests.distributed.runs import Run, Runs
from tests.parity import reference
from tests.parity.test_dense_reference import batches_of, settings_of

After = Callable[["Dense", int, dict[str, Tensor], dict[str, Tensor]], None]
SPD = {"kind": "spd", "strength": 0.7}
MOFO = {"kind": "mofo", "fraction": 0.3}


class Dense:
    """Adam with its moments in reach, on whole fp64 tensors."""

    def __init__(self, run: Run, after: After) -> None:
        self.model = reference.DenseOlmo2(run.world_folder / "model")
        self.source = {name: value.clone() for name, value in self.model.weights.items()}
        self.first = {name: torch.zeros_like(value) for name, value in self.source.items()}
        self.second = {name: torch.zeros_like(value) for name, value in self.source.items()}
        self.settings, self.after = settings_of(run.recipe), after
        self.decay = 0.0
        for value in self.model.weights.values():
            value.requires_grad_()

    def step(self, number: int, ids: Tensor) -> tuple[float, float]:
        s, weights = self.settings, self.model.weights
        loss = reference.mean_loss(self.model.logits(ids), ids)
        found = torch.autograd.grad(loss, list(weights.values()))
        grads = dict(zip(weights, found, strict=True))
        norm = math.sqrt(sum(float(grad.pow(2).sum()) for grad in grads.values()))
        scale = min(1.0, s.max_grad_norm / (norm + 1e-6))
        lr = reference.rate(number, s)
        self.decay = lr * s.weight_decay
        before = {name: value.detach().clone() for name, value in weights.items()}
        with torch.no_grad():
            for name, weight in weights.items():
                grad = grads[name] * scale
                self.first[name] = s.betas[0] * self.first[name] + (1 - s.betas[0]) * grad
                self.second[name] = s.betas[1] * self.second[name] + (1 - s.betas[1]) * grad**2
                first = self.first[name] / (1 - s.betas[0] ** (number + 1))
                second = self.second[name] / (1 - s.betas[1] ** (number + 1))
                if weight.dim() == 2:
                    weight.mul_(1 - self.decay)
                weight.sub_(lr * first / (second.sqrt() + s.eps))
            self.after(self, number, before, grads)
        return float(loss.detach()), norm


def spd(dense: Dense, number: int, before: dict[str, Tensor], grads: dict[str, Tensor]) -> None:
    for name, weight in dense.model.weights.items():
        old, new = before[name] - dense.source[name], weight - dense.source[name]
        if -(grads[name] * old).sum() < 0:
            ratio = ((new.norm() - old.norm()) / new.norm()).clamp(0, 1)
            weight.sub_(0.7 * ratio * new)


def mofo(dense: Dense, number: int, before: dict[str, Tensor], grads: dict[str, Tensor]) -> None:
    for name, weight in dense.model.weights.items():
        if weight.dim() == 1:
            continue
        count = int(weight.numel() * 0.3 + 1e-9)
        threshold = dense.first[name].abs().view(-1).topk(count).values.min()
        moved = dense.first[name].abs() >= threshold
        weight.copy_(torch.where(moved, weight, before[name] * (1 - dense.decay)))


def restore(share: str, every: int, score: str, scope: str, momentum: str) -> After:
    def after(
        dense: Dense, number: int, before: dict[str, Tensor], grads: dict[str, Tensor]
    ) -> None:
        if (number + 1) % every:
            return
        names = sorted(n for n in dense.source if "layers" in n and "norm" not in n)
        groups = [names] if scope == "global" else [[name] for name in names]
        for group in groups:
            flat = [dense.source[n].view(-1) for n in group]
            source = torch.cat(flat)
            now = torch.cat([dense.model.weights[n].detach().view(-1) for n in group])
            change = (now - source).abs()
            ranked = change / (source.abs() + 1e-8) if score == "relative" else change
            count = math.floor(Fraction(share) * source.numel())
            back = torch.zeros(source.numel(), dtype=torch.bool)
            back[torch.sort(ranked, descending=True, stable=True).indices[:count]] = True
            for name, mine in zip(group, back.split([f.numel() for f in flat]), strict=True):
                mine = mine.view(dense.source[name].shape)
                weight = dense.model.weights[name]
                weight.copy_(torch.where(mine, dense.source[name], weight))
                if momentum == "zero":
                    dense.first[name][mine] = 0

    return after


def assert_equal(run: Run, after: After) -> None:
    dense = Dense(run, after)
    found = [dense.step(number, ids) for number, ids in enumerate(batches_of(run))]
    assert run.losses == pytest.approx([loss for loss, _ in found], rel=2e-6)
    norms = [line["grad_norm"] for line in run.metrics]
    assert norms == pytest.approx([norm for _, norm in found], rel=2e-5)
    assert_same_weights(run.masters, {n: w.detach() for n, w in dense.model.weights.items()})


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.long), 3])
@pytest.mark.parametrize("method", [SPD, MOFO], ids=lambda method: method["kind"])
def test_update_rules(runs: Runs, method: dict, world: int):
    assert_equal(runs.get(method, world), spd if method is SPD else mofo)


def test_both_rules_are_at_work(runs: Runs):
    """Neither would pass as plain training, nor SPD without its condition."""
    run = runs.get(SPD, 1)
    assert 0 < sum(line["method/pulled"] for line in run.metrics) < len(run.metrics)

    def always(dense: Dense, number: int, before: dict, grads: dict) -> None:
        spd(dense, number, before, {name: before[name] - dense.source[name] for name in grads})

    for method, rule in ((SPD, lambda *given: None), (MOFO, lambda *given: None), (SPD, always)):
        with pytest.raises(AssertionError):
            assert_equal(runs.get(method, 1), rule)


@pytest.mark.parametrize(
    ("world", "section"),
    [
        pytest.param(1, {"every_steps": 2, "fraction": 0.3}, marks=pytest.mark.long),
        (2, {"every_steps": 2, "fraction": 0.3}),
        pytest.param(3, {"every_steps": 2, "fraction": 0.3}, marks=pytest.mark.long),
        (2, {"every_steps": 1, "fraction": 0.15, "scope": "tensor", "momentum": "keep"}),
        (3, {"every_steps": 3, "fraction": 0.4, "score": "absolute"}),
    ],
)
def test_restoration_while_training(runs: Runs, world: int, section: dict):
    run = runs.get("sft", world, restore=section)
    after = restore(
        str(section["fraction"]),
        section["every_steps"],
        section.get("score", "relative"),
        section.get("scope", "global"),
        section.get("momentum", "zero"),
    )
    assert_equal(run, after)

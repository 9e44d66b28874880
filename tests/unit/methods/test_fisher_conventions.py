"""Fisher information of a softmax unit: labels, sums of rows, scale; all values known exactly."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from forgetscale.api import ParamShard
from forgetscale.config import CalibrationConfig, FisherBasisConfig
from forgetscale.methods.fisher.samples import Pass, vector_part

D = torch.float64
SURE = torch.tensor([0.9, 0.05, 0.05], dtype=D)
ROWS = 8192
NAME = "w"


def true_fisher(p: torch.Tensor) -> torch.Tensor:
    return torch.diag(p) - torch.outer(p, p)


def scores(p: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the gradient of the negative log-likelihood in the logits, one row a label."""
    return p - torch.nn.functional.one_hot(labels, len(p)).to(p)


class Rows:
    """A calibration whose rows have given gradients; samples are sums of consecutive rows."""

    num_ranks = 1

    def __init__(self, grads: torch.Tensor) -> None:
        self._grads = grads

    def sample_gradients(self, source, *, per_sample, sampled):
        for part in self._grads.split(per_sample):
            grad = part.sum(0).float()
            yield [ParamShard(NAME, (len(grad),), 0, grad, torch.zeros(len(grad)))]


def measure(grads: torch.Tensor, per_sample: int) -> SimpleNamespace:
    config = FisherBasisConfig(blocks_per_sample=per_sample, max_rank=2, explained=1.0)
    found = Pass([NAME], [NAME])
    found.run(Rows(grads), CalibrationConfig(path="x"), len(grads), config)
    part = vector_part(found, None, NAME, len(grads), config, lambda value: value)
    return SimpleNamespace(diagonal=found.squares[NAME].double() / len(grads), part=part)


@pytest.fixture(scope="module")
def drawn() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return scores(SURE, torch.multinomial(SURE, ROWS, replacement=True, generator=generator))


@pytest.mark.parametrize("per_sample", [8, 16])
def test_sums_of_rows_give_the_same_information(drawn: torch.Tensor, per_sample: int):
    """With drawn labels scores are mean-zero, so cross terms of a sum vanish in expectation."""
    exact = true_fisher(SURE)
    found = measure(drawn, per_sample)
    # Standard error of a second moment over N / B sums: about sqrt(2 B / N) of it.
    error = 5 * (2 * per_sample / ROWS) ** 0.5
    assert torch.allclose(found.diagonal, exact.diagonal(), rtol=error)
    values = torch.linalg.eigvalsh(exact).flip(0)[:2]
    assert torch.allclose(found.part.values, values, rtol=error)
    assert found.part.trace == pytest.approx(float(exact.trace()), rel=error)
    # The published rule squares the mean of a batch and multiplies by B: low by that factor.
    means = drawn.view(-1, per_sample, 3).mean(1)
    published = per_sample * means.square().sum(0) / ROWS
    assert torch.allclose(per_sample * published, found.diagonal, rtol=1e-5)
    assert bool((published < 2 / per_sample * exact.diagonal()).all())


def test_labels_of_the_data_all_but_vanish_where_the_model_is_sure():
    """The numbers of the note: the likely label 0.015, drawn ones 0.185, a rare one 1.715."""
    traces = [measure(scores(SURE, torch.full((64,), label)), 1).part.trace for label in (0, 1)]
    assert traces[0] == pytest.approx(0.015, rel=1e-5)
    assert traces[1] == pytest.approx(1.715, rel=1e-5)
    assert float(true_fisher(SURE).trace()) == pytest.approx(0.185)


def test_a_loss_scale_changes_nothing(drawn: torch.Tensor):
    """Values are divided by their model-wide mean, so a factor of all gradients falls out."""
    once, scaled = measure(drawn[:512], 4), measure(7.5 * drawn[:512], 4)
    for found in (once, scaled):
        found.values = found.part.values / found.part.values.mean()
    assert torch.allclose(scaled.values, once.values, rtol=1e-5)
    assert torch.allclose(scaled.part.directions, once.part.directions, atol=1e-5)
    assert torch.allclose(scaled.diagonal, 7.5**2 * once.diagonal, rtol=1e-5)

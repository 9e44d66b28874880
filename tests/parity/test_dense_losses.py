"""Runs under token losses against the dense fp64 reference: losses, norms, weights, metrics."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.distributed import tiny
from tests.distributed.compare import assert_same_weights
from tests.distributed.runs import MASKED, SSU, Run, Runs
from tests.parity import reference
from tests.parity.test_dense_reference import batches_of, frozen_of, settings_of


def token_terms(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return log-probabilities of all next tokens and of the labels."""
    log_p = logits[:, :-1].log_softmax(-1).flatten(0, 1)
    return log_p, log_p.gather(1, ids[:, 1:].reshape(-1, 1))[:, 0]


def eaft_weights(logits: Tensor, ids: Tensor, top_k: int, divisor: float, power: int) -> Tensor:
    log_p, _ = token_terms(logits.detach(), ids)
    q = log_p.topk(top_k, -1).values.softmax(-1)
    return (-(q * q.log()).sum(-1) / divisor) ** power


def eaft(logits: Tensor, ids: Tensor) -> Tensor:
    return -(eaft_weights(logits, ids, 20, math.log(20), 1) * token_terms(logits, ids)[1]).mean()


def eaft_published(logits: Tensor, ids: Tensor) -> Tensor:
    weight = eaft_weights(logits, ids, 20, 3.0, 2)
    return -(weight * token_terms(logits, ids)[1]).mean()


def eaft_of_weights(logits: Tensor, ids: Tensor) -> Tensor:
    weight = eaft_weights(logits, ids, 5, math.log(5), 1)
    return -(weight * token_terms(logits, ids)[1]).sum() / weight.sum()


def mile(logits: Tensor, ids: Tensor) -> Tensor:
    log_p, label = token_terms(logits, ids)
    weight = 1 - (log_p.exp() * log_p).sum(-1).detach()
    return -(weight / weight.mean() * label).mean()


def focal(logits: Tensor, ids: Tensor) -> Tensor:
    _, label = token_terms(logits, ids)
    return -((1 - label.exp()) ** 2 * label).mean()


def smoothed(logits: Tensor, ids: Tensor) -> Tensor:
    log_p, label = token_terms(logits, ids)
    return (-0.8 * label - 0.2 * log_p.mean(-1)).mean()


LOSSES = {
    "eaft": ({"kind": "eaft"}, eaft),
    "eaft-published": ({"kind": "eaft", "alpha": 2, "divisor": 3.0}, eaft_published),
    "eaft-of-weights": ({"kind": "eaft", "top_k": 5, "normalize": "weights"}, eaft_of_weights),
    "mile": ({"kind": "mile"}, mile),
    "focal": ({"kind": "focal"}, focal),
    "smoothed": ({"kind": "cross_entropy", "label_smoothing": 0.2}, smoothed),
}
CASES = [
    *[("sft", "eaft", size) for size in (1, 2, 3)],
    *[("ssu", "eaft", size) for size in (1, 3)],
    *[pytest.param("masked", "eaft", size, marks=pytest.mark.long) for size in (1, 3)],
    *[("ssu", "eaft-of-weights", size) for size in (1, 3)],
    ("sft", "eaft-published", 2),
    ("sft", "mile", 2),
    ("sft", "focal", 1),
    ("sft", "smoothed", 2),
]


@pytest.fixture(scope="module")
def dense():
    """Reference of a run, by protection and loss."""
    made: dict[tuple[str, str], reference.Trained] = {}

    def get(run: Run, loss: str) -> reference.Trained:
        kind = run.recipe["method"]["kind"]
        if (kind, loss) not in made:
            columns, rows = frozen_of(run) if kind == "ssu" else ({}, {})
            made[kind, loss] = reference.train(
                run.world_folder / "model",
                batches_of(run),
                settings_of(run.recipe),
                columns,
                rows,
                loss_of=LOSSES[loss][1],
            )
        return made[kind, loss]

    return get


@pytest.mark.parametrize(("protection", "loss", "size"), CASES)
def test_run_equals_the_reference(runs: Runs, dense, protection: str, loss: str, size: int):
    method = {"sft": {"kind": "sft"}, "ssu": SSU, "masked": MASKED}[protection]
    run = runs.get({**method, "loss": LOSSES[loss][0]}, size)
    expected = dense(run, loss)
    assert run.losses == pytest.approx(expected.losses, rel=3e-6)
    norms = [line["grad_norm"] for line in run.metrics]
    assert norms == pytest.approx(expected.norms, rel=2e-5)
    assert_same_weights(run.masters, expected.weights)


def test_losses_differ_from_cross_entropy(runs: Runs):
    plain = runs.get("sft", 2).losses
    for loss in ("eaft", "mile", "smoothed"):
        found = runs.get({"kind": "sft", "loss": LOSSES[loss][0]}, 2).losses
        assert abs(found[0] - plain[0]) > 1e-4
    for line in runs.get("sft", 2).metrics:
        assert not [name for name in line if name.startswith("method/")]


def test_metrics_of_the_first_step(runs: Runs):
    run = runs.get({"kind": "sft", "loss": {"kind": "eaft"}}, 3)
    model = reference.DenseOlmo2(run.world_folder / "model")
    ids = torch.from_numpy(tiny.set_rows(rows=40, seed=1)).long()[run.rows[0]]
    with torch.no_grad():
        logits = model.logits(ids)
    weight = eaft_weights(logits, ids, 20, math.log(20), 1)
    first = run.metrics[0]
    assert first["method/mean_gate"] == pytest.approx(float(weight.mean()), rel=1e-5)
    assert first["method/gated_fraction"] == pytest.approx(float((weight < 0.5).double().mean()))
    assert first["method/cross_entropy"] == pytest.approx(
        float(reference.mean_loss(logits, ids)), rel=1e-6
    )
    assert first["method/cross_entropy"] == pytest.approx(runs.get("sft", 2).losses[0], rel=1e-6)

"""Runs that stay close to the source model against the dense fp64 reference."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.distributed import tiny
from tests.distributed.compare import assert_same_weights
from tests.distributed.harness import RankServer
from tests.distributed.runs import SSU, Runs
from tests.parity import reference
from tests.parity.test_dense_reference import batches_of, frozen_of, settings_of

TOP_K, FACTOR = 9, 2.0


@pytest.fixture(scope="module")
def cache(ranks: RankServer, runs: Runs) -> Path:
    folder = runs.world()
    recipe = tiny.write_recipe(folder / "kl-parity.yaml", runs.recipe("kl-parity"))
    arguments = ["analyze", "--cache-logits", "--config", recipe, "--output", folder / "kl-cache"]
    arguments += ["--top-k", TOP_K]
    outcome = ranks.run("cli:run", 2, arguments=[str(part) for part in arguments])
    assert outcome.codes == [0, 0], outcome.logs
    return folder / "kl-cache"


def outcomes(log_p: Tensor, ids: Tensor) -> Tensor:
    """Probabilities of K tokens and of all others together."""
    p = log_p.exp()
    rest = p.scatter(-1, ids, 0.0).sum(-1, keepdim=True)
    return torch.cat([p.gather(-1, ids), rest], -1)


def dense_loss(kind: str, direction: str, folder: Path):
    source = reference.DenseOlmo2(folder / "model")

    def loss(logits: Tensor, ids: Tensor) -> Tensor:
        with torch.no_grad():
            log_q = source.logits(ids)[:, :-1].log_softmax(-1)
        best = log_q.topk(TOP_K, -1).indices
        log_p = logits[:, :-1].log_softmax(-1)
        mine, theirs = outcomes(log_p, best), outcomes(log_q, best)
        first, second = (theirs, mine) if direction == "forward" else (mine, theirs)
        divergence = (first * (first / second).log()).sum(-1)
        label = log_p.gather(-1, ids[:, 1:, None])[..., 0]
        weight = label.exp().detach() if kind == "asft" else 1.0
        return (FACTOR * divergence - weight * label).mean()

    return loss


@pytest.mark.parametrize(
    ("protection", "kind", "direction", "size"),
    [
        ("sft", "sft_kl", "forward", 2),
        ("ssu", "sft_kl", "forward", 3),
        ("ssu", "asft", "reverse", 1),
    ],
)
def test_run_equals_the_reference(
    runs: Runs, cache: Path, protection: str, kind: str, direction: str, size: int
):
    section = {"kind": kind, "factor": FACTOR, "direction": direction}
    section["reference"] = {"cache": str(cache)}
    method = {"sft": {"kind": "sft"}, "ssu": SSU}[protection]
    run = runs.get({**method, "loss": section}, size)
    columns, rows = frozen_of(run) if protection == "ssu" else ({}, {})
    expected = reference.train(
        run.world_folder / "model",
        batches_of(run),
        settings_of(run.recipe),
        columns,
        rows,
        loss_of=dense_loss(kind, direction, run.world_folder),
    )
    assert run.losses == pytest.approx(expected.losses, rel=5e-6)
    norms = [line["grad_norm"] for line in run.metrics]
    assert norms == pytest.approx(expected.norms, rel=3e-5)
    assert_same_weights(run.masters, expected.weights)

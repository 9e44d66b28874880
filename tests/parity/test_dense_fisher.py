"""Fisher bases against dense fp64 ones: whole gradients of one row at a time, by autograd."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.harness import RankServer
from tests.distributed.runs import Runs
from tests.parity import reference
from tests.parity.test_dense_scores import ROWS, drawn_labels

ALL = ["diagonal", "vector", "left", "right"]
FISHER = {"structures": ALL, "max_rank": 5, "explained": 1.0}
NAMES = ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj")


class Watched(reference.DenseOlmo2):
    """Keeps the outputs of linear layers, whose gradients make the left factor."""

    def __init__(self, folder) -> None:
        super().__init__(folder)
        self.outputs: dict[str, torch.Tensor] = {}
        for weight in self.weights.values():
            weight.requires_grad_()

    def _linear(self, name, x):
        found = super()._linear(name, x)
        found.retain_grad()
        self.outputs[name] = found
        return found


def dense(folder, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return per-row gradients and per-token sums of both factors."""
    model = Watched(folder)
    found: dict[str, list] = {f"{kind}/{n}": [] for kind in ("grad", "S", "C") for n in NAMES}
    for row, wanted in zip(ROWS, labels, strict=True):
        for weight in model.weights.values():
            weight.grad = None
        log_probs = model.logits(row[None])[0, :-1].log_softmax(-1)
        (-log_probs.gather(-1, wanted[:, None]).sum()).backward()
        for name in NAMES:
            delta, a = model.outputs[name].grad[0], model.inputs[name][0].detach()
            found[f"grad/{name}"].append(model.weights[f"{name}.weight"].grad.flatten())
            found[f"S/{name}"].append(delta.t() @ delta)
            found[f"C/{name}"].append(a.t() @ a)
    return {key: torch.stack(parts) for key, parts in found.items()}


@pytest.fixture(scope="module", params=["data", "sampled"])
def pair(request, ranks: RankServer, runs: Runs, tmp_path_factory):
    """What a basis holds, and the dense gradients."""
    method = {"kind": "alignguard", "fisher": {**FISHER, "labels": request.param}}
    recipe = runs.recipe(f"dense-fisher-{request.param}", method)
    output = str(tmp_path_factory.mktemp("bases") / "basis")
    ranks.must("fisher:measure", 1, recipe=recipe, output=output)
    found = ranks.must("fisher:read", 1, recipe=recipe, directory=output).value
    folder = runs.world() / "model"
    labels = ROWS[:, 1:] if request.param == "data" else drawn_labels(folder)
    return found, dense(folder, labels)


def close(found: torch.Tensor, exact: torch.Tensor, share: float = 2e-4) -> bool:
    return torch.allclose(found.double(), exact, rtol=share, atol=share * float(exact.abs().max()))


@pytest.mark.parametrize("name", NAMES)
def test_diagonal(pair, name):
    found, exact = pair
    scale = found["payload"]["scale"]["diagonal"]
    expected = exact[f"grad/{name}"].square().mean(0)
    assert close(found[f"diagonal/{name}.weight"] * scale, expected)


@pytest.mark.parametrize("name", NAMES)
def test_directions_of_the_flattened_weight(pair, name):
    found, exact = pair
    grads = exact[f"grad/{name}"]
    scale = found["payload"]["scale"]["vector"]
    _, singular, right = torch.linalg.svd(grads, full_matrices=False)
    values = singular.square() / len(grads)
    assert close(found[f"values/vector/{name}.weight"] * scale, values[:5])
    assert found[f"trace/vector/{name}.weight"] * scale == pytest.approx(
        float(values.sum()), rel=1e-4
    )
    basis = found[f"vector/{name}.weight"].double()
    assert close(basis @ basis.t(), right[:5].t() @ right[:5], 2e-3)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", NAMES)
def test_factors(pair, name, side):
    found, exact = pair
    sums = {key: exact[f"{key}/{name}"].sum(0) for key in ("S", "C")}
    rows, tokens = len(ROWS), ROWS.numel()
    mine, other = ("S", "C") if side == "left" else ("C", "S")
    factor = sums[mine] * float(sums[other].trace()) / tokens / rows
    values, vectors = torch.linalg.eigh(factor)
    scale = found["payload"]["scale"][side]
    assert close(found[f"values/{side}/{name}.weight"] * scale, values.flip(0)[:5])
    assert found[f"trace/{side}/{name}.weight"] * scale == pytest.approx(
        float(factor.trace()), rel=1e-4
    )
    basis, top = found[f"{side}/{name}.weight"].double(), vectors.flip(1)[:, :5]
    assert close(basis @ basis.t(), top @ top.t(), 5e-3)


def test_scale_is_the_mean_retained_eigenvalue(pair):
    found, _ = pair
    for kind in ("vector", "left", "right"):
        values = [v for key, v in found.items() if key.startswith(f"values/{kind}/")]
        assert float(torch.cat(values).mean()) == pytest.approx(1, rel=1e-5)
    diagonals = [v.flatten() for key, v in found.items() if key.startswith("diagonal/")]
    assert float(torch.cat(diagonals).mean()) == pytest.approx(1, rel=1e-5)

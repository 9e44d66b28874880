"""Penalties, proximal steps and projections in real runs: ranks, precision, offload, resume."""

from __future__ import annotations

import signal

import pytest
import safetensors
import torch

from tests.distributed.compare import assert_same_weights
from tests.distributed.harness import RankServer
from tests.distributed.runs import PROBE, Runs
from tests.distributed.test_export import logits_of

READINGS = ["left", "right", "two_sided", "vector", "mask"]


def guarded(reading: str, action: str = "project_update", **fields) -> dict:
    section = {"kind": "alignguard", "reading": reading, "action": action, **fields}
    return section | {"fisher": {"max_rank": 3}}


def sides(run) -> dict[str, torch.Tensor]:
    """Return every tensor of the run's basis that is whole, by key."""
    found = {}
    for path in sorted((run.folder / "fisher").glob("*.safetensors")):
        with safetensors.safe_open(path, "pt") as file:
            found |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return found


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize(
    "reading", ["left", pytest.param("right", marks=pytest.mark.long), "two_sided"]
)
def test_the_change_has_no_part_in_the_directions(runs: Runs, reading: str, size: int):
    run = runs.get(guarded(reading), size)
    basis, seen = sides(run), 0
    for name, weight in run.masters.items():
        change = (weight - run.source[name]).double()
        left, right = (basis.get(f"{kind}/{name}") for kind in ("left", "right"))
        if left is None and right is None:
            continue
        inner = change if left is None else left.double().t() @ change
        inner = inner if right is None else inner @ right.double()
        assert float(inner.norm() / change.norm()) < 1e-6, name
        assert float(change.norm()) > 1e-3, name
        seen += 1
    assert seen == 14
    # Decay pulls toward zero and the optimizer turns gradients: both would have leaked.
    assert all(line["method/leak"] > 1e-4 for line in run.metrics[2:])


@pytest.mark.parametrize(
    "reading",
    [
        pytest.param("right", marks=pytest.mark.long),
        "two_sided",
        pytest.param("vector", marks=pytest.mark.long),
        "mask",
    ],
)
def test_one_rank_equals_three(runs: Runs, reading: str):
    one, many = (runs.get(guarded(reading), size) for size in (1, 3))
    assert many.losses == pytest.approx(one.losses, rel=2e-6)
    assert_same_weights(many.masters, one.masters)
    for key in ("method/leak", "method/change_norm", "method/penalty"):
        values = [[line[key] for line in run.metrics] for run in (one, many)]
        assert values[1] == pytest.approx(values[0], rel=1e-3, abs=1e-6), key


@pytest.mark.parametrize(("action", "strength"), [("penalty", 0.5), ("prox", 50.0)])
def test_the_penalty_counts_once_whatever_the_ranks(runs: Runs, action: str, strength: float):
    method = guarded("two_sided", action, strength=6 * strength, task_strength=strength)
    one, many = (runs.get(method, size) for size in (1, 2))
    plain = runs.get("sft", 1)
    assert many.losses == pytest.approx(one.losses, rel=2e-6)
    assert_same_weights(many.masters, one.masters)
    norms = [run.metrics[-1]["method/change_norm"] for run in (one, many)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)
    shrunk, free = (
        sum(float((r.masters[n] - r.source[n]).square().sum()) for n in r.source if "proj" in n)
        for r in (one, plain)
    )
    assert shrunk < 0.9 * free


def test_the_penalty_counts_once_whatever_the_micro_batches(runs: Runs):
    method = guarded("two_sided", "penalty", strength=3.0, task_strength=0.5)
    many, one = (runs.get(method, train__micro_batch_size=size) for size in (2, 7))
    assert many.losses == pytest.approx(one.losses, rel=2e-6)
    assert_same_weights(many.masters, one.masters)
    # Counted four times it would be seen: its gradient is not small beside the task's.
    last = one.metrics[-1]
    assert last["method/penalty_grad_norm"] > 0.1 * last["method/task_grad_norm"]


@pytest.mark.parametrize(
    ("size", "offload"), [pytest.param(2, False, marks=pytest.mark.long), (2, True)]
)
def test_copies_stay_in_step_at_half_precision(runs: Runs, size: int, offload: bool):
    world = runs.world("bf16", dtype=torch.bfloat16)
    run = runs.get(guarded("left"), size, offload=offload, world=world, model__dtype="bfloat16")
    for name, weight in run.outcome.value["working"].items():
        assert torch.equal(weight, run.masters[name].to(torch.bfloat16)), name
    live = run.outcome.value["logits"]
    exported = logits_of(run.folder / "export", torch.bfloat16)
    assert torch.allclose(live, exported, atol=2e-2)
    assert len(PROBE) == live.shape[0]


def test_resume_at_another_number_of_ranks(ranks: RankServer, runs: Runs):
    method = guarded("right")
    recipe = runs.recipe("anchored-resized", method)
    options = {"recipe": recipe, "step": 3, "rank": 1, "number": int(signal.SIGUSR1)}
    assert ranks.run("crash:train_and_signal", 2, **options).codes == [75, 75]
    found = ranks.must("training:train", 3, recipe=recipe, probe=PROBE).value
    whole = runs.get(method, 3)
    assert_same_weights(found["masters"], whole.masters)


def test_checkpoint_of_another_protection(ranks: RankServer, runs: Runs):
    recipe = runs.recipe("anchored-changed", guarded("left"))
    options = {"recipe": recipe, "step": 3, "rank": 0, "number": int(signal.SIGUSR1)}
    assert ranks.run("crash:train_and_signal", 1, **options).codes == [75]
    recipe["method"]["target_modules"] = ["q_proj"]
    outcome = ranks.run("training:command", 1, recipe=recipe)
    assert outcome.codes == [2] and "target_modules" in outcome.errors[0]


def test_a_penalty_that_overshoots(ranks: RankServer, runs: Runs):
    recipe = runs.recipe("overshoots", {"kind": "l2_sp", "strength": 1e4})
    outcome = ranks.run("training:command", 2, recipe=recipe)
    assert outcome.codes == [2, 2]
    assert "use method.action: prox" in outcome.errors[0]
    recipe = runs.recipe("shrinks", {"kind": "l2_sp", "strength": 1e4, "action": "prox"})
    run = ranks.must("training:train", 1, recipe=recipe).value
    source = runs.get("sft", 1).source
    farthest = max(float((w - source[n]).abs().max()) for n, w in run["masters"].items())
    assert farthest < 1e-3


def test_online_ewc_adds_the_information_of_the_task_before(ranks: RankServer, runs: Runs):
    first = runs.get({"kind": "online_ewc", "strength": 5.0, "action": "prox"}, 1)
    previous = str(first.folder / "fisher")
    method = {"kind": "online_ewc", "previous": previous, "gamma": 0.5, "strength": 5.0}
    second = runs.get({**method, "action": "prox"}, 2)
    found = []
    for run in (first, second):
        recipe, directory = run.recipe, str(run.folder / "fisher")
        found.append(ranks.must("fisher:read", 1, recipe=recipe, directory=directory).value)
    # The same task twice: 1.5 times the information, and readers divide it by 1.5 times the mean.
    scales = [value["payload"]["scale"]["diagonal"] for value in found]
    assert scales[1] == pytest.approx(1.5 * scales[0], rel=1e-6)
    key = "diagonal/model.layers.1.mlp.up_proj.weight"
    assert torch.allclose(found[1][key], found[0][key], rtol=1e-4, atol=1e-6)
    assert found[1]["payload"]["earlier"]["gamma"] == 0.5


def test_bytes_are_reported(runs: Runs):
    run = runs.get(guarded("left"), 1)
    # Three directions by columns, one norm: q, o and gate, up have 35 columns, o 36, down 51.
    widths = sum(run.source[name].shape[1] for name in run.source if "_proj" in name)
    ranks_of = {k: v.shape[1] for k, v in sides(run).items() if k.startswith("left/")}
    assert set(ranks_of.values()) <= {1, 2, 3}
    expected = sum(
        m * run.source[k.removeprefix("left/")].shape[1] + 1 for k, m in ranks_of.items()
    )
    assert run.metrics[-1]["method/reduced_bytes"] == 4 * expected <= 4 * (3 * widths + 14)

"""AlignGuard on adapters in real runs: the update that is applied, on any number of ranks."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.compare import assert_same_weights
from tests.distributed.harness import RankServer
from tests.distributed.runs import Runs
from tests.distributed.test_anchored_runs import sides

LORA = {"kind": "lora", "rank": 4, "alpha": 16}
SCALE = 4.0


def section(reading: str, action: str = "penalty", **fields) -> dict:
    found = {"kind": "alignguard_lora", "reading": reading, "action": action, **fields}
    return found | {"fisher": {"max_rank": 3}}


def updates(run) -> dict[str, torch.Tensor]:
    """Return the update of every adapted matrix, fp64, by its name in the source model."""
    factors = run.outcome.value["factors"]
    ends = (".lora_A", ".lora_B")
    modules = {name.removesuffix(end) for name in factors for end in ends if name.endswith(end)}
    return {
        f"{m}.weight": SCALE * factors[m + ends[1]].double() @ factors[m + ends[0]].double()
        for m in modules
    }


@pytest.mark.parametrize(("reading", "size"), [("left", 2), ("right", 3)])
def test_a_projected_update_has_no_part_in_the_directions(runs: Runs, reading: str, size: int):
    method = section(reading, "project_update")
    run = runs.get(method, size, adapter=LORA)
    basis, found = sides(run), updates(run)
    assert len(found) == 14
    for name, update in found.items():
        directions = basis[f"{reading}/{name}"].double()
        inner = directions.t() @ update if reading == "left" else update @ directions
        assert float(inner.norm() / update.norm()) < 1e-5, name
    assert run.metrics[-1]["method/leak"] > 1e-3, "without the projection it would have leaked"


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(section("vector", strength=2.0), marks=pytest.mark.long),
        section("two_sided", strength=2.0),
        section("left", "prox", strength=200.0, task_strength=20.0),
        pytest.param(
            section("right", collision={"strength": 5.0, "metric": "diagonal", "tau": 0.001}),
            marks=pytest.mark.long,
        ),
    ],
    ids=["vector", "two_sided", "prox", "collision"],
)
def test_one_rank_equals_two(runs: Runs, method: dict):
    one, many = (runs.get(method, size, adapter=LORA) for size in (1, 2))
    assert many.losses == pytest.approx(one.losses, rel=2e-6)
    assert_same_weights(many.outcome.value["factors"], one.outcome.value["factors"])
    last = one.metrics[-1]
    total = sum(float(update.square().sum()) for update in updates(one).values())
    assert total > 0 and last["method/penalty"] > 0 and 0 < last["method/leak"] < 1
    if "collision" in method:
        assert last["method/collision"] > 0


def test_the_penalty_holds_the_update_back(runs: Runs):
    held = runs.get(section("left", strength=50.0, task_strength=0.0), 2, adapter=LORA)
    free = runs.get("sft", 2, adapter=LORA)
    basis = sides(held)
    energies = []
    for run in (held, free):
        total = 0.0
        for name, update in updates(run).items():
            inner = basis[f"left/{name}"].double().t() @ update
            total += float((basis[f"values/left/{name}"].double()[:, None] * inner**2).sum())
        energies.append(total)
    assert energies[0] < 0.7 * energies[1]


def test_the_penalty_counts_once_whatever_the_micro_batches(runs: Runs):
    method = section("left", strength=20.0)
    many, one = (runs.get(method, adapter=LORA, train__micro_batch_size=n) for n in (2, 7))
    assert many.losses == pytest.approx(one.losses, rel=2e-6)
    assert_same_weights(many.outcome.value["factors"], one.outcome.value["factors"])
    # Counted four times it would be seen: its gradient is as long as the task's.
    last = one.metrics[-1]
    assert last["method/penalty_grad_norm"] > 0.3 * last["method/task_grad_norm"]


def test_a_penalty_that_overshoots(ranks: RankServer, runs: Runs):
    changes = {"adapter": LORA, "train.num_steps": 12}
    method = section("left", strength=1e6)
    for size, stiff in ((2, method), (1, {"kind": "l2_sp_lora", "strength": 1e6})):
        recipe = runs.recipe(f"stiff-{stiff['kind']}", stiff, changes)
        outcome = ranks.run("training:command", size, recipe=recipe)
        assert outcome.codes == [2] * size, outcome.errors
        sentence = outcome.errors[0]
        assert "overshoot it" in sentence and "method.strength (1e+06)" in sentence
        assert ("method.action: prox" in sentence) == ("action" in stiff)
    recipe = runs.recipe("stiff-prox", section("left", "prox", strength=1e6), changes)
    assert ranks.run("training:command", 1, recipe=recipe).codes == [0]
    # A hundred times the default is strong, and sound.
    recipe = runs.recipe("strong", section("left", strength=25.0), changes)
    assert ranks.run("training:command", 1, recipe=recipe).codes == [0]


def test_layers_that_are_not_adapted(ranks: RankServer, runs: Runs):
    adapter = {**LORA, "target_modules": ["q_proj"]}
    method = {"kind": "l2_sp_lora", "target_modules": ["up_proj"]}
    recipe = runs.recipe("not-adapted", method, {"adapter": adapter})
    outcome = ranks.run("training:command", 1, recipe=recipe)
    assert outcome.codes == [2] and "names no adapted layer" in outcome.errors[0]

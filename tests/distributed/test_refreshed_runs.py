"""Fisher information measured again in mid-run: against dense weights, over ranks, at a resume."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest
import safetensors
import torch

from tests.distributed.compare import assert_same_weights
from tests.distributed.harness import RankServer
from tests.distributed.runs import Runs, load_weights

LORA = {"kind": "lora", "rank": 3, "alpha": 12}
FISHER = {"max_rank": 3}
NAME = "model.layers.1.mlp.up_proj.weight"


def method_of(kind: str, **fields) -> dict:
    section = {"kind": kind, "fisher": FISHER, "refresh": {"steps": 2}, **fields}
    return section


LEFT = method_of("alignguard", reading="left", action="prox", strength=50.0)
METHODS = {
    "left": (LEFT, {}),
    "mask": (method_of("alignguard", reading="mask"), {}),
    "vector": (method_of("alignguard", reading="vector", action="prox", strength=50.0), {}),
    "two_sided lora": (method_of("alignguard_lora", reading="two_sided", strength=2.0), LORA),
    "ewc_lora": (method_of("ewc_lora", strength=0.2), LORA),
}


def basis_of(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safetensors.safe_open(path, "pt") as file:
            found |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return found


@pytest.mark.parametrize(
    "name",
    [
        *("left", "mask", "ewc_lora"),
        pytest.param("vector", marks=pytest.mark.long),
        pytest.param("two_sided lora", marks=pytest.mark.long),
    ],
)
def test_any_number_of_ranks(runs: Runs, name: str):
    method, adapter = METHODS[name]
    more = {"adapter": adapter} if adapter else {}
    sizes = (1, 2, 3) if name == "left" else (1, 2)
    one, *others = (runs.get(method, size, **more) for size in sizes)
    still = runs.get({**method, "refresh": None}, 1, **more)
    assert one.losses[:2] == still.losses[:2], "nothing is measured again before step 2"
    assert one.losses[3:] != still.losses[3:]
    for many in others:
        assert many.losses == pytest.approx(one.losses, rel=3e-6)
        assert_same_weights(
            many.outcome.value["factors"] or many.masters,
            one.outcome.value["factors"] or one.masters,
        )
    kept = sorted(path.name for path in (one.folder / "fisher-refreshed").iterdir())
    # The checkpoint of step 4 goes by the estimate of step 2, that of step 6 by that of step 4.
    assert kept == ["step-00000002", "step-00000004"]


@pytest.mark.parametrize("adapter", [False, pytest.param(True, marks=pytest.mark.long)])
def test_it_is_measured_at_the_live_weights(ranks: RankServer, runs: Runs, tmp_path, adapter: bool):
    """Export the weights of the refresh, calibrate them as a model of their own, take the mean."""
    method = method_of("alignguard_lora", strength=2.0) if adapter else LEFT
    more = {"adapter": LORA} if adapter else {}
    method = {**method, "refresh": {"steps": 4}}
    options = {"optim__schedule": "constant", **more}
    run = runs.get(method, 2, **options)
    short = runs.get(method, 2, train__num_steps=4, **options)
    assert short.losses == run.losses[:4]
    world = tmp_path / "world"
    shutil.copytree(run.world_folder, world, ignore=shutil.ignore_patterns("run-*"))
    shutil.copyfile(
        short.folder / "export" / "model.safetensors", world / "model" / "model.safetensors"
    )
    recipe = runs.recipe("again", {"kind": "alignguard", "fisher": FISHER}, world=world)
    recipe["run"]["seed"] = 3 + 4
    ranks.must("fisher:measure", 1, recipe=recipe, output=str(tmp_path / "basis"))
    first, again = basis_of(run.folder / "fisher"), basis_of(tmp_path / "basis")
    found = basis_of(run.folder / "fisher-refreshed" / "step-00000004")

    def dense(basis: dict) -> torch.Tensor:
        directions = basis[f"left/{NAME}"].double()
        return (directions * basis[f"values/left/{NAME}"].double()) @ directions.t()

    expected = (dense(first) + dense(again)) / 2
    bound = float(expected.abs().max())
    assert torch.allclose(dense(found), expected, atol=2e-4 * bound)
    assert not torch.allclose(dense(found), dense(first), atol=2e-2 * bound)
    old = first[f"left/{NAME}"].double()
    span = found[f"left/{NAME}"].double()
    assert torch.allclose(span @ (span.t() @ old), old, atol=1e-5), "the first span stays"


@pytest.mark.parametrize("name", ["left", pytest.param("ewc_lora", marks=pytest.mark.long)])
def test_stop_and_resume_is_bit_equal(ranks: RankServer, runs: Runs, name: str):
    method, adapter = METHODS[name]
    changes = {"adapter": adapter} if adapter else {}
    whole = runs.get(method, 2, **changes)
    # Step 3 goes by the estimate of step 2; the checkpoint of step 4 is saved before its own.
    for step in (3, 4):
        recipe = runs.recipe(f"refreshed-{name}-{step}", method, changes)
        options = {"recipe": recipe, "step": step, "rank": 1, "number": int(signal.SIGUSR1)}
        assert ranks.run("crash:train_and_signal", 2, **options).codes == [75, 75]
        ranks.must("training:command", 2, recipe=recipe)
        found = load_weights(Path(recipe["run"]["output_dir"]) / "export")
        assert all(torch.equal(found[key], value) for key, value in whole.export.items()), step


def test_resume_at_another_number_of_ranks(ranks: RankServer, runs: Runs):
    recipe = runs.recipe("refreshed-resized", LEFT)
    options = {"recipe": recipe, "step": 3, "rank": 0, "number": int(signal.SIGUSR1)}
    assert ranks.run("crash:train_and_signal", 2, **options).codes == [75, 75]
    found = ranks.must("training:train", 3, recipe=recipe).value
    assert_same_weights(found["masters"], runs.get(LEFT, 3).masters)


def test_a_lost_estimate_and_a_changed_recipe(ranks: RankServer, runs: Runs):
    recipe = runs.recipe("refreshed-lost", LEFT)
    options = {"recipe": recipe, "step": 3, "rank": 0, "number": int(signal.SIGUSR1)}
    assert ranks.run("crash:train_and_signal", 1, **options).codes == [75]
    folder = Path(recipe["run"]["output_dir"]) / "fisher-refreshed" / "step-00000002"
    aside = folder.rename(folder.with_name("aside"))
    outcome = ranks.run("training:command", 1, recipe=recipe)
    assert outcome.codes == [2] and "step-00000002" in outcome.errors[0]
    aside.rename(folder)
    ranks.must("training:command", 1, recipe=recipe)

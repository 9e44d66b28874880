"""``forgetscale check --no-step`` on every published recipe, with a small model of its kind."""

from __future__ import annotations

import json

import pytest

from forgetscale.cli import main
from forgetscale.masks import FreezePlan, save_plan
from tests.distributed import tiny
from tests.distributed.harness import ROOT

RECIPES = sorted((ROOT / "launch" / "recipes").glob("*.yaml"))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory):
    return tiny.make_world(tmp_path_factory.mktemp("recipes"))


def check(capsys, monkeypatch, recipe, world, *arguments: str) -> str:
    monkeypatch.chdir(ROOT)
    places = [f"model.path={world}/model", f"data.path={world}/data"]
    places += [f"run.output_dir={world}/run"]
    if recipe.stem.endswith("-lora"):
        places += ["adapter.rank=4"]  # the small model has matrices of 12 rows
    settings = [part for place in places for part in ("--set", place)]
    command = ["check", "--config", str(recipe), "--no-step", *settings, *arguments]
    assert main(command) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def test_there_are_recipes():
    assert len(RECIPES) >= 3


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_published_recipes(capsys, monkeypatch, world, recipe):
    (world / "model" / "model.safetensors").rename(world / "hidden")
    try:
        found = json.loads(check(capsys, monkeypatch, recipe, world, "--json", "--world-size=8"))
    finally:
        (world / "hidden").rename(world / "model" / "model.safetensors")
    assert found["world_size"] == 8 and found["mock_step"] is None
    state = found["memory"]["state"]
    assert state["masters"] * 2 == state["moments"] > 0
    # Page-locked room comes in powers of two.
    assert 1 <= found["memory"]["copies"] / (state["masters"] + state["moments"]) < 2
    assert found["memory"]["host"] == found["memory"]["copies"]
    assert found["memory"]["device"] > state["weights"] + state["masters"] + state["moments"]
    expected = {"sft": "full", "lora": "adapter"}
    assert found["layout"] == expected.get(recipe.stem.rpartition("-")[2], "compact")
    assert (found["num_frozen"] > 0) == (found["layout"] != "full")
    assert found["executed_flops_per_token"] > found["flops_per_token"] > 0


def test_an_adapter_is_known_from_shapes(capsys, monkeypatch, world):
    (lora,) = [path for path in RECIPES if path.stem.endswith("-lora")]
    found = json.loads(check(capsys, monkeypatch, lora, world, "--json"))
    assert found["num_frozen"] == found["num_parameters"]
    state = found["memory"]["state"]
    assert state["masters"] == 4 * found["num_adapter"] > 0
    assert state["weights"] == 2 * (found["num_parameters"] + found["num_adapter"])
    text = check(capsys, monkeypatch, lora, world)
    assert f"adapter               {found['num_adapter']:,} trained" in text


def test_the_table(capsys, monkeypatch, world):
    text = check(capsys, monkeypatch, RECIPES[0], world, "--world-size=2")
    for part in (
        "memory per rank, 2 ranks:",
        "gathered parameters",
        "activations",
        "gradient bucket",
        "peak on the device",
        "copies for checkpoints (host)",
        "in host memory",
        "layout compact; plan drawn with the right counts",
    ):
        assert part in text


def test_a_plan_that_exists_is_read(capsys, monkeypatch, world, tmp_path):
    save_plan(tmp_path / "plan", FreezePlan(whole=frozenset({"model.norm.weight"})))
    arguments = ("--json", "--set", f"method.plan={tmp_path / 'plan'}")
    found = json.loads(check(capsys, monkeypatch, RECIPES[0], world, *arguments))
    assert found["num_frozen"] == tiny.SIZES["hidden_size"]
    assert found["plan_source"] == f"read from {tmp_path / 'plan'}"


def test_a_plan_that_does_not_exist(capsys, monkeypatch, world, tmp_path):
    monkeypatch.chdir(ROOT)
    missing = tmp_path / "none"
    settings = [f"model.path={world}/model", f"data.path={world}/data", f"method.plan={missing}"]
    options = [part for setting in settings for part in ("--set", setting)]
    assert main(["check", "--config", str(RECIPES[0]), "--no-step", *options]) == 2
    assert f"{missing} does not exist" in capsys.readouterr().err


def test_single_weights_keep_all_states(capsys, monkeypatch, world):
    full, single = (
        json.loads(check(capsys, monkeypatch, RECIPES[0], world, "--json", *arguments))
        for arguments in (("--set", "method={kind: sft}"), ("--set", "method.axis=element"))
    )
    assert single["memory"]["state"] == full["memory"]["state"]
    assert single["plan_source"].startswith("not known before it is made")

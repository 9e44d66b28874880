"""``forgetscale check --no-step`` of methods that go by Fisher information: 70B, and a refresh."""

from __future__ import annotations

import json

import pytest
from transformers import LlamaConfig

from forgetscale.cli import main
from tests.distributed import tiny

LLAMA_70B = LlamaConfig(
    architectures=["LlamaForCausalLM"],
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    vocab_size=128_256,
)
REFRESH = {"steps": 100, "calibration": {"path": "held-out"}}
LORA = {"kind": "lora", "rank": 4, "alpha": 16}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory):
    return tiny.make_world(tmp_path_factory.mktemp("protected"))


def check(capsys, world, method: dict, *arguments: str, **changes) -> str:
    recipe = tiny.base_recipe(world, "run", basis="made-before", **method)
    recipe["model"] |= changes.pop("model", {})
    path = tiny.write_recipe(world / "run.yaml", recipe | changes)
    assert main(["check", "--config", str(path), "--no-step", *arguments]) == 0
    return capsys.readouterr().out


@pytest.mark.long
def test_alignguard_at_70b(capsys, world):
    LLAMA_70B.save_pretrained(world / "big")
    model = {"path": str(world / "big"), "dtype": "bfloat16"}
    method = {"kind": "alignguard", "refresh": REFRESH}
    arguments = ("--world-size=64", "--json")
    memory = json.loads(check(capsys, world, method, *arguments, model=model))["memory"]
    # Slices of the source at two bytes, the embeddings and the head not among them.
    assert memory["protection"]["anchors"] == pytest.approx(2 * 68.5e9 / 64, rel=1e-2)
    assert memory["protection"]["basis"] < 0.01 * memory["protection"]["anchors"]
    assert memory["refresh"]["weights"] == memory["state"]["weights"] > 2.2e9
    assert memory["refresh"]["moments"] == 0
    assert 30e9 < memory["device"] < 40e9


def test_a_refresh_is_part_of_the_peak(capsys, world):
    def memory(method: dict, **changes) -> dict:
        return json.loads(check(capsys, world, method, "--json", **changes))["memory"]

    plain = memory({"kind": "alignguard"})
    assert plain["refresh"] is None
    sides = memory({"kind": "alignguard", "refresh": REFRESH})
    assert sides["refresh"]["weights"] == sides["state"]["weights"]
    assert sides["device"] - plain["device"] == sides["refresh"]["weights"]
    # A diagonal needs reduced gradients of all weights, beside an adapter that trains few.
    lora = {"kind": "ewc_lora", "refresh": REFRESH}
    diagonal = memory(lora, adapter=LORA)
    assert diagonal["refresh"]["moments"] == plain["state"]["moments"]
    assert diagonal["refresh"]["moments"] > 5 * diagonal["state"]["moments"]
    text = check(capsys, world, lora, adapter=LORA)
    assert "model of a refresh" in text and "GB, in a refresh" in text
    collision = {"strength": 0.1, "metric": "diagonal"}
    guard = {"kind": "alignguard_lora", "refresh": REFRESH}
    without = memory(guard, adapter=LORA)
    with_metric = memory(guard | {"collision": collision}, adapter=LORA)
    assert without["refresh"]["moments"] == 0 < with_metric["refresh"]["moments"]
    assert with_metric["protection"]["basis"] > without["protection"]["basis"]

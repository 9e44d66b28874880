"""LoRA under ZeRO-3: what is trained, what stays, checkpoints and exports."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM

from tests.distributed import tiny
from tests.distributed.compare import assert_same_weights
from tests.distributed.harness import RankServer
from tests.distributed.runs import Run, Runs, load_weights, read_lines

LORA = {"kind": "lora", "rank": 3, "alpha": 12}
SFT = {"kind": "sft"}
LINEAR = 14
EXACT = ("step", "loss", "grad_norm", "lr", "target_tokens")


def exact(folder: Path) -> list[tuple]:
    return [tuple(line[key] for key in EXACT) for line in read_lines(folder / "metrics.jsonl")]


def adapter_weights(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "export-adapter" / "adapter_model.safetensors")


def factors_of(run: Run) -> dict[str, torch.Tensor]:
    return run.outcome.value["factors"]


@pytest.fixture(scope="module")
def one(runs: Runs) -> Run:
    return runs.get(SFT, 1, adapter=LORA)


def test_only_factors_are_trained(one: Run):
    trained = one.outcome.value["trained"]
    assert len(trained) == 2 * LINEAR and all(".lora_" in name for name in trained)
    assert set(trained) == set(factors_of(one))
    for name, weight in one.masters.items():
        assert torch.equal(weight, one.source[name]), name
    assert all(bool(value.any()) for value in factors_of(one).values()), "B left zero"
    assert one.losses[-1] < one.losses[0]


@pytest.mark.parametrize("size", [2, 3])
def test_one_rank_equals_many(runs: Runs, one: Run, size: int):
    many = runs.get(SFT, size, adapter=LORA)
    assert many.losses == pytest.approx(one.losses, rel=2e-6)
    assert_same_weights(factors_of(many), factors_of(one))


@pytest.mark.parametrize(
    "changes",
    [{"model__activation_checkpointing": True}, {"offload": True}, {"train__micro_batch_size": 3}],
    ids=["checkpointing", "offload", "micro-batches"],
)
def test_the_way_it_is_computed_changes_nothing(runs: Runs, one: Run, changes: dict):
    other = runs.get(SFT, 2, adapter=LORA, **changes)
    assert other.losses == pytest.approx(one.losses, rel=2e-6)
    assert_same_weights(factors_of(other), factors_of(one))


def test_bf16_follows_fp32(runs: Runs, one: Run):
    world = runs.world("bf16", dtype=torch.bfloat16)
    run = runs.get(SFT, 2, world=world, model__dtype="bfloat16", adapter=LORA)
    assert run.losses == pytest.approx(one.losses, rel=1e-2)
    pair = "model.layers.0.self_attn.q_proj"
    delta = 4.0 * factors_of(run)[f"{pair}.lora_B"] @ factors_of(run)[f"{pair}.lora_A"]
    merged = (run.source[f"{pair}.weight"].float() + delta).bfloat16()
    assert torch.equal(run.export[f"{pair}.weight"], merged), "merged in fp32, rounded once"


def test_first_values_do_not_depend_on_ranks_and_b_is_zero(ranks: RankServer, runs: Runs):
    recipe = runs.recipe("adapter-start", SFT, {"adapter": LORA})
    found = [ranks.must("adapters:start", size, recipe=recipe).value for size in (1, 2, 3)]
    for name, value in found[0].items():
        assert all(torch.equal(value, other[name]) for other in found[1:]), name
        assert bool(value.any()) == name.endswith("lora_A")
    a = found[0]["model.layers.0.mlp.down_proj.lora_A"]
    bound = 51**-0.5
    assert a.abs().max() <= bound and a.abs().max() > 0.9 * bound and abs(a.mean()) < 0.2 * bound
    assert not torch.equal(a, found[0]["model.layers.1.mlp.down_proj.lora_A"])


@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.long), 3])
def test_stop_and_resume_is_bit_equal(ranks: RankServer, runs: Runs, size: int):
    """Also at another number of ranks: stopped on two, gone on with ``size``."""
    recipe = runs.recipe(f"adapter-resumed-{size}", SFT, {"adapter": LORA})
    options = {"recipe": recipe, "step": 3, "rank": 1, "number": int(signal.SIGUSR1)}
    assert ranks.run("crash:train_and_signal", 2, **options).codes == [75, 75]
    folder = runs.world() / f"adapter-resumed-{size}"
    saved = folder / "checkpoints" / "step-00000003"
    names = set()
    for path in saved.glob("states-*.safetensors"):
        names |= set(safetensors.torch.load_file(path))
    assert names and all(name.rpartition(".")[2] in ("lora_A", "lora_B") for name in names)
    ranks.must("training:command", size, recipe=recipe)
    whole = runs.get(SFT, 2, adapter=LORA)
    if size == 2:
        assert exact(folder) == exact(whole.folder)
        expected, found = adapter_weights(whole.folder), adapter_weights(folder)
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    losses = [line["loss"] for line in read_lines(folder / "metrics.jsonl")]
    assert losses == pytest.approx(whole.losses, rel=2e-6)


def test_resume_with_another_scale_is_refused(ranks: RankServer, runs: Runs):
    run = runs.get(SFT, 2, adapter=LORA)
    recipe = run.recipe | {"adapter": LORA | {"alpha": 13}}
    outcome = ranks.run("training:command", 2, recipe=recipe)
    assert outcome.codes == [2, 2] and "adapter.alpha is 12.0 there" in outcome.logs[0]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_both_exports_load_and_agree_with_the_live_model(runs: Runs, one: Run):
    import peft

    from tests.distributed.runs import PROBE

    ids = torch.tensor(PROBE)
    merged = AutoModelForCausalLM.from_pretrained(one.folder / "export", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(one.world_folder / "model", dtype=torch.float32)
    with torch.no_grad():
        before = base(ids).logits
        adapted = peft.PeftModel.from_pretrained(base, one.folder / "export-adapter")
        found = adapted(ids).logits
        expected = one.outcome.value["logits"]
        assert (merged(ids).logits - expected).abs().max() < 2e-5
    assert (found - expected).abs().max() < 2e-5
    assert (found - before).abs().max() > 0.05
    config = json.loads((one.folder / "export-adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(
        [f"{x}_proj" for x in ("q", "k", "v", "o", "gate", "up", "down")]
    )


def test_export_without_merging(ranks: RankServer, runs: Runs, one: Run):
    run = runs.get(SFT, 1, adapter=LORA | {"merge": False})
    assert not (run.folder / "export").exists()
    expected = adapter_weights(one.folder)
    found = adapter_weights(run.folder)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_export_command_writes_the_same(ranks: RankServer, runs: Runs):
    run = runs.get(SFT, 2, adapter=LORA)
    output = run.folder / "again"
    ranks.must("export:command", 3, recipe=run.recipe, output=str(output))
    assert all(torch.equal(load_weights(output)[n], w) for n, w in run.export.items())
    again = safetensors.torch.load_file(run.folder / "again-adapter" / "adapter_model.safetensors")
    assert all(torch.equal(again[n], w) for n, w in adapter_weights(run.folder).items())


def test_some_layers_rslora_and_dropout(runs: Runs):
    adapter = {
        "kind": "lora",
        "rank": 4,
        "alpha": 8,
        "rslora": True,
        "dropout": 0.2,
        "target_modules": ["layers.1.mlp.up_proj", "v_proj"],
    }
    run = runs.get(SFT, 2, adapter=adapter)
    assert sorted(factors_of(run)) == sorted(
        f"model.layers.{module}.lora_{x}"
        for module in ("0.self_attn.v_proj", "1.self_attn.v_proj", "1.mlp.up_proj")
        for x in "AB"
    )
    config = json.loads((run.folder / "export-adapter" / "adapter_config.json").read_text())
    assert config["use_rslora"] and config["lora_dropout"] == 0.2
    assert len(config["target_modules"]) == 3, "whole names: up_proj of layer 0 is not adapted"
    name = "model.layers.1.mlp.up_proj"
    delta = 4.0 * factors_of(run)[f"{name}.lora_B"] @ factors_of(run)[f"{name}.lora_A"]
    expected = run.source[f"{name}.weight"] + delta
    assert torch.allclose(run.export[f"{name}.weight"], expected, atol=1e-6)
    for other, weight in run.source.items():
        if other not in (f"{name}.weight",) and "v_proj" not in other:
            assert torch.equal(run.export[other], weight)


def test_optimizer_and_gradient_bytes_are_the_adapters(ranks: RankServer, runs: Runs):
    recipes = {
        "adapter": runs.recipe("bytes-adapter", SFT, {"adapter": LORA}),
        "full": runs.recipe("bytes-full", SFT),
    }
    outcome = ranks.must("memory:states", 2, recipes=recipes)
    for value in outcome.values:
        assert value["adapter"]["predicted"] == value["adapter"]["measured"]
        part, full = value["adapter"]["measured"], value["full"]["measured"]
        for name in ("masters", "moments", "gradients"):
            assert part[name] < 0.2 * full[name]


def test_tiny_sizes_are_what_this_file_counts(one: Run):
    count = sum(value.numel() for value in factors_of(one).values())
    width, inner, kv, heads = tiny.SIZES["hidden_size"], tiny.SIZES["intermediate_size"], 12, 36
    per_layer = 2 * (width + heads) + 2 * (width + kv) + 3 * (width + inner)
    assert count == 2 * 3 * per_layer

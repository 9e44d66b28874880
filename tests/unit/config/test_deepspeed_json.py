"""The DeepSpeed JSON: untested modes are refused by name, one sentence each."""

from __future__ import annotations

import json

import pytest

from forgetscale.config import validate_recipe
from forgetscale.config.deepspeed import accumulation_steps, engine_config, read_deepspeed
from forgetscale.errors import ConfigError

GOOD = {"zero_optimization": {"stage": 3, "overlap_comm": True, "contiguous_gradients": True}}


def write(tmp_path, value) -> object:
    path = tmp_path / "ds.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def with_zero(**settings) -> dict:
    return {"zero_optimization": {**GOOD["zero_optimization"], **settings}}


OFFLOAD = {"device": "cpu"}
REFUSED = {
    "SuperOffload": with_zero(offload_optimizer={**OFFLOAD, "super_offload": True}),
    "ZenFlow": with_zero(zenflow={"topk_ratio": 0.1}),
    "MiCS": with_zero(mics_shard_size=2),
    "MiCS gather": with_zero(mics_hierarchical_params_gather=True),
    "hierarchical partition": with_zero(zero_hpz_partition_size=2),
    "quantised gradients": with_zero(zero_quantized_gradients=True),
    "quantised weights": with_zero(zero_quantized_weights=True),
    "LoCo": with_zero(zeropp_loco_param={"err_beta": 0.8}),
    "parameter offload": with_zero(offload_param={"device": "cpu"}),
    "NVMe offload": with_zero(offload_optimizer={"device": "nvme"}),
    "NVMe path": with_zero(offload_optimizer={**OFFLOAD, "nvme_path": "/tmp"}),
    "partial offload": with_zero(offload_optimizer={**OFFLOAD, "ratio": 0.3}),
    "round robin": with_zero(round_robin_gradients=True),
    "gather 16 bit on save": with_zero(stage3_gather_16bit_weights_on_model_save=True),
    "compile": {**GOOD, "compile": {"deepcompile": True}},
    "autotuning": {**GOOD, "autotuning": {"enabled": True}},
    "sparse gradients": {**GOOD, "sparse_gradients": True},
    "amp": {**GOOD, "amp": {"enabled": True}},
    "tensor parallel": {**GOOD, "tensor_parallel": {"autotp_size": 2}},
    "data efficiency": {**GOOD, "data_efficiency": {"enabled": True}},
    "curriculum": {**GOOD, "curriculum_learning": {"enabled": True}},
    "compression": {**GOOD, "compression_training": {}},
    "prescale": {**GOOD, "prescale_gradients": True},
    "async io": {**GOOD, "aio": {}},
    "checkpoint": {**GOOD, "checkpoint": {"load_universal": True}},
    "elasticity": {**GOOD, "elasticity": {"enabled": True}},
}


@pytest.mark.parametrize("mode", REFUSED)
def test_untested_mode(tmp_path, mode: str):
    path = write(tmp_path, REFUSED[mode])
    with pytest.raises(ConfigError) as caught:
        read_deepspeed(path)
    message = str(caught.value)
    assert message.startswith(f"deepspeed: {path}: ") and message.endswith(".")
    assert "\n" not in message
    assert "not tested with freeze plans" in message
    different = {
        key
        for section in (REFUSED[mode], REFUSED[mode]["zero_optimization"])
        for key in section
        if key not in GOOD and key not in GOOD["zero_optimization"]
    }
    assert any(key in message for key in different)


@pytest.mark.parametrize(
    ("name", "value", "owner"),
    [
        ("train_batch_size", 8, "train.global_batch_size"),
        ("train_micro_batch_size_per_gpu", 8, "train.micro_batch_size"),
        ("gradient_accumulation_steps", 2, "train.global_batch_size"),
        ("gradient_clipping", 1.0, "optim.max_grad_norm"),
        ("bf16", {"enabled": True}, "model.dtype"),
        ("fp16", {"enabled": True}, "model.dtype"),
        ("data_types", {}, "train.accumulation_dtype"),
        ("optimizer", {"type": "Adam"}, "optim"),
        ("scheduler", {}, "optim.schedule"),
        ("activation_checkpointing", {}, "model.activation_checkpointing"),
    ],
)
def test_a_value_lives_in_one_place(tmp_path, name: str, value: object, owner: str):
    with pytest.raises(ConfigError) as caught:
        read_deepspeed(write(tmp_path, {**GOOD, name: value}))
    assert f"{name} belongs in the recipe ({owner}); remove it." in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "is not valid JSON"),
        ("[]", "must hold a JSON object"),
        ("{}", "zero_optimization.stage is None, expected 3"),
        ('{"zero_optimization": 3}', "zero_optimization.stage is None, expected 3"),
        ('{"zero_optimization": {"stage": 2}}', "zero_optimization.stage is 2, expected 3"),
        (json.dumps(with_zero(overlap_com=1)), "nearest tested: overlap_comm"),
    ],
)
def test_bad_file(tmp_path, text: str, expected: str):
    with pytest.raises(ConfigError) as caught:
        read_deepspeed(write(tmp_path, text))
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_no_file(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_deepspeed(tmp_path / "none.json")


def recipe_of(tmp_path, **train) -> object:
    return validate_recipe(
        {
            "run": {"name": "a", "output_dir": "o"},
            "model": {"path": "m", "dtype": train.pop("dtype", "bfloat16")},
            "data": {"path": "d"},
            "method": {"kind": "sft"},
            "optim": {"max_grad_norm": 0.25},
            "train": {"num_steps": 1, **train},
            "deepspeed": str(write(tmp_path, GOOD)),
        }
    )


@pytest.mark.parametrize(
    ("rows", "micro", "world", "steps"),
    [(7, 2, 1, 4), (7, 2, 2, 2), (7, 2, 3, 2), (32, 8, 4, 1), (1, 8, 3, 1), (33, 8, 2, 3)],
)
def test_micro_batches_are_equal_on_all_ranks(tmp_path, rows, micro, world, steps):
    recipe = recipe_of(tmp_path, global_batch_size=rows, micro_batch_size=micro)
    assert accumulation_steps(recipe, world) == steps
    config = engine_config(recipe, world)
    assert config["train_batch_size"] == micro * steps * world
    assert config["gradient_accumulation_steps"] == steps


def test_clipping_and_types_are_spelled_out(tmp_path):
    config = engine_config(recipe_of(tmp_path), 2)
    assert config["gradient_clipping"] == 0.25
    assert config["bf16"] == {"enabled": True}
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}
    narrow = engine_config(recipe_of(tmp_path, accumulation_dtype="bfloat16"), 2)
    assert narrow["data_types"] == {"grad_accum_dtype": "bf16"}
    assert "bf16" not in engine_config(recipe_of(tmp_path, dtype="float32"), 2)


@pytest.mark.parametrize("name", ["zero3.json", "zero3_offload.json"])
def test_shipped_files_are_accepted(name: str):
    from tests.distributed.harness import ROOT

    found = read_deepspeed(ROOT / "ds_configs" / name)
    assert found["zero_optimization"]["stage"] == 3

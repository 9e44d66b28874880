"""SafeLoRA on folders: worked numbers, selection, what is written."""

from __future__ import annotations

import json
import math

import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM

from forgetscale.cli import main
from forgetscale.errors import ConfigError, DataError
from forgetscale.knowledge.safelora import (
    Projected,
    choose_matrices,
    project_factor,
    read_adapter,
    update_cosine,
)
from tests.distributed import tiny

A = torch.tensor([[1.0, 3.0]], dtype=torch.float64)
B = torch.tensor([[1.0], [2.0], [-1.0]], dtype=torch.float64)
V = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("form", "projected", "cosine"),
    [
        ("published", [[1.5, 4.5], [2.0, 6.0], [0.5, 1.5]], 0.8006407690254357),
        ("exact", [[5 / 3, 5.0], [4 / 3, 4.0], [-1 / 3, -1.0]], 0.8819171036881969),
    ],
)
def test_worked_numbers(form: str, projected: list, cosine: float):
    moved = project_factor(V, B, form=form)
    assert torch.allclose(
        moved @ A, torch.tensor(projected, dtype=torch.float64), rtol=0, atol=1e-9
    )
    assert update_cosine(A, moved, B) == pytest.approx(cosine, abs=1e-9)
    again = project_factor(V, moved, form=form)
    assert torch.allclose(again, moved, atol=1e-9) == (form == "exact"), "only one is a projector"
    scaled = project_factor(10 * V, B, form=form)
    assert torch.allclose(scaled, moved, atol=1e-9) == (form == "exact")


def test_rank_keeps_leading_directions():
    one = project_factor(V, B, form="exact", rank=1)
    lead = torch.linalg.svd(V)[0][:, :1]
    assert torch.allclose(one, lead @ lead.t() @ B, atol=1e-12)
    assert torch.equal(
        project_factor(V, B, form="exact", rank=9), project_factor(V, B, form="exact")
    )


def test_cosine_of_nothing_is_zero():
    assert update_cosine(A, 0 * B, B) == 0.0
    assert update_cosine(A, B, 3 * B) == pytest.approx(1.0, abs=1e-12)


def test_the_nth_smallest_cosine_is_the_threshold():
    found = [Projected(str(i), c, B) for i, c in enumerate((0.5, 0.1, 0.3, 0.3, 0.9))]
    assert choose_matrices(found, threshold=None, count=1) == ["1"]
    assert choose_matrices(found, threshold=None, count=2) == ["1", "2", "3"], "equal ones too"
    assert choose_matrices(found, threshold=0.5, count=None) == ["0", "1", "2", "3"]
    with pytest.raises(ConfigError, match="6 matrices are to be projected, the adapter has 5"):
        choose_matrices(found, threshold=None, count=6)
    with pytest.raises(ConfigError, match="one of"):
        choose_matrices(found, threshold=0.1, count=1)


@pytest.fixture
def folders(tmp_path):
    aligned = tiny.make_model(tmp_path / "aligned", seed=1, dtype=torch.bfloat16)
    base = tiny.make_model(tmp_path / "base", seed=2, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(5)
    weights = {}
    for layer in range(2):
        key = f"base_model.model.model.layers.{layer}.mlp.up_proj"
        weights[f"{key}.lora_A.weight"] = torch.randn(2, 35, generator=generator)
        weights[f"{key}.lora_B.weight"] = torch.randn(51, 2, generator=generator)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    safetensors.torch.save_file(weights, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["up_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    return adapter, aligned, base


def run(folders, output, *more: str) -> int:
    adapter, aligned, base = folders
    return main(
        ["safelora", "--adapter", str(adapter), "--aligned", str(aligned), "--base", str(base)]
        + ["--output", str(output), *more]
    )


def weights_of(folder) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "model.safetensors")


def test_command(folders, tmp_path, capsys):
    adapter, aligned, base = folders
    assert run(folders, tmp_path / "out", "--matrices", "1") == 0
    assert capsys.readouterr().out.count("projected") == 1
    before, after = read_adapter(adapter), read_adapter(tmp_path / "out" / "adapter")
    manifest = json.loads((tmp_path / "out" / "adapter" / "manifest.json").read_text())
    (chosen,) = manifest["payload"]["projected"]
    cosines = manifest["payload"]["cosines"]
    assert cosines[chosen] == min(cosines.values())
    source, other = weights_of(aligned), weights_of(base)
    merged = weights_of(tmp_path / "out" / "model")
    for name, (lora_a, lora_b) in before.factors.items():
        expected = lora_b
        if name == chosen:
            v = source[name].float() - other[name].float()
            expected = v @ v.t() @ lora_b / v.norm()
        assert torch.equal(after.factors[name][0], lora_a)
        assert torch.allclose(after.factors[name][1], expected, rtol=1e-4, atol=1e-5)
        whole = source[name].float() + 1.5 * after.factors[name][1] @ lora_a
        assert torch.equal(merged[name], whole.bfloat16())
    for name in set(source) - set(before.factors):
        assert torch.equal(merged[name], source[name])
    AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    assert run(folders, tmp_path / "out", "--matrices", "1") != 0, "nothing is overwritten"


def test_threshold_below_all_cosines_changes_nothing(folders, tmp_path):
    options = ("--threshold", "-1", "--form", "exact", "--rank", "3", "--no-merge")
    assert run(folders, tmp_path / "out", *options) == 0
    assert not (tmp_path / "out" / "model").exists()
    before, after = read_adapter(folders[0]), read_adapter(tmp_path / "out" / "adapter")
    assert all(torch.equal(before.factors[n][1], b) for n, (_, b) in after.factors.items())


def test_bad_input(folders, tmp_path, capsys):
    adapter, aligned, base = folders
    assert run((adapter, aligned, aligned), tmp_path / "out") == 2
    assert "there is nothing to project on" in capsys.readouterr().err
    assert run(folders, tmp_path / "out", "--rank", "3") == 2
    assert "--rank 3 is for --form exact" in capsys.readouterr().err
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(DataError, match="expected plain LoRA, got LORA use_dora"):
        read_adapter(adapter)
    with pytest.raises(DataError, match="holds no adapter_config.json"):
        read_adapter(tmp_path)
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"use_rslora": True}))
    assert read_adapter(adapter).scale == 3 / math.sqrt(2)

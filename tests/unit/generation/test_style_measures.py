"""Surprise, gradient cosine and drift against plain formulas."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from forgetscale.config import ModelConfig, validate_recipe
from forgetscale.data import TokenSet, tokenizer_hash, write_token_set
from forgetscale.errors import ConfigError, DataError
from forgetscale.generation.loading import load_causal_model
from forgetscale.generation.style import (
    documents_of,
    gradient_cosine,
    mean_gradient,
    mean_nll,
    measure_style,
    parameter_drift,
)
from tests.unit.data.test_mixture_units import SIZE


@pytest.fixture(scope="module")
def sets(talker, tmp_path_factory):
    root = tmp_path_factory.mktemp("style")
    for number, name in enumerate(("task", "self")):
        ids = np.random.default_rng(number).integers(5, 90, size=(3, SIZE))
        mask = np.zeros((3, SIZE), bool)
        mask[:, 10:16] = mask[:, 26:32] = True
        write_token_set(
            root / name,
            ids,
            vocab_size=302,
            tokenizer_sha256=tokenizer_hash(talker),
            doc_lens=np.tile([16, 16], 3),
            supervised=mask,
        )
    return root


def training(talker, sets, names=("task", "self")):
    parts = [{"kind": "sft", "path": str(sets / name), "weight": 0.5} for name in names]
    return validate_recipe(
        {
            "run": {"name": "a", "output_dir": "runs/a"},
            "model": {"path": str(talker), "dtype": "float32"},
            "data": {"kind": "mixture", "sets": parts},
            "train": {"num_steps": 1},
            "method": {"kind": "sft"},
            "deepspeed": "ds_configs/zero3.json",
        }
    )


def test_measures_are_their_formulas(talker, sets, tmp_path):
    result = measure_style(training(talker, sets), tmp_path, num_rows=2)
    assert json.loads((tmp_path / "style.json").read_text()) == result
    model = load_causal_model(ModelConfig(path=talker, dtype="float32"), "cpu")
    gradients = []
    for name in ("task", "self"):
        rows = TokenSet(sets / name)
        ids = rows.read([0, 1]).reshape(4, 16)
        logits = model(ids).logits[:, 9:15]
        loss = torch.nn.functional.cross_entropy(logits.reshape(24, -1), ids[:, 10:16].reshape(24))
        assert result["nll"][name] == pytest.approx(float(loss.detach()), rel=1e-5)
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    flat = [torch.cat([part.flatten() for part in found]) for found in gradients]
    cosine = torch.nn.functional.cosine_similarity(flat[0].double(), flat[1].double(), dim=0)
    assert result["cosine"]["task|self"]["all"] == pytest.approx(float(cosine), abs=1e-5)
    assert set(result["cosine"]["task|self"]) == {"0", "1", "other", "all"}
    assert result["gradient_norm"]["task"] == pytest.approx(float(flat[0].norm()), rel=1e-4)
    assert min(result["excess_nll"].values()) == 0


def test_a_gradient_is_aligned_with_itself_and_against_its_negative(talker, sets):

    model = load_causal_model(ModelConfig(path=talker, dtype="float32"), "cpu")
    documents = documents_of(TokenSet(sets / "task"), [0])
    found = mean_gradient(model, documents)
    negative = {name: -2 * part for name, part in found.items()}
    assert all(value == pytest.approx(1) for value in gradient_cosine(found, found).values())
    assert gradient_cosine(found, negative)["all"] == pytest.approx(-1)
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(ValueError, match="different parameters"):
        gradient_cosine(found, {})
    assert mean_nll(model, documents) > 0


def test_drift(talker, tmp_path):
    tuned = shutil.copytree(talker, tmp_path / "tuned")
    assert set(parameter_drift(talker, tuned).values()) == {0.0}
    tensors = load_file(tuned / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    whole = math.sqrt(sum(float(part.double().square().sum()) for part in tensors.values()))
    size = float(tensors[name].norm())
    tensors[name] = tensors[name] * 1.5
    save_file(tensors, tuned / "model.safetensors", metadata={"format": "pt"})
    drift = parameter_drift(talker, tuned)
    assert drift[name] == pytest.approx(0.5, rel=1e-5)
    assert drift["all"] == pytest.approx(0.5 * size / whole, rel=1e-5)
    del tensors[name]
    save_file(tensors, tuned / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match="only one of .* holds the tensor"):
        parameter_drift(talker, tuned)


def test_one_set_is_not_enough(talker, sets, tmp_path):
    with pytest.raises(ConfigError, match="between sets"):
        measure_style(training(talker, sets, ("task",)), tmp_path)

"""Skeletons: names, shapes and buffers without weights."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from forgetscale.errors import ConfigError, DataError
from forgetscale.models import (
    buffer_values,
    build_skeleton,
    construct,
    parameter_shapes,
    read_model_config,
    restore_buffers,
)


@pytest.mark.parametrize("name", ["plain", "tied", "half"])
def test_names_and_shapes_are_those_of_the_model(name: str, request):
    folder = request.getfixturevalue(name)
    skeleton = build_skeleton(read_model_config(folder))
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert all(param.is_meta for param in skeleton.parameters()), "weights were allocated"
    assert parameter_shapes(skeleton) == parameter_shapes(model)
    assert ("lm_head.weight" in parameter_shapes(skeleton)) == (name != "tied")


def test_buffers_are_those_of_transformers_in_fp32(half):
    skeleton = build_skeleton(read_model_config(half))
    model = AutoModelForCausalLM.from_pretrained(half, dtype=torch.bfloat16)
    found = buffer_values(skeleton)
    expected = {n: b for n, b in model.named_buffers() if b.is_floating_point()}
    assert found.keys() == expected.keys() and found
    for name, value in expected.items():
        assert found[name].dtype == value.dtype == torch.float32
        assert torch.equal(found[name], value)


def test_restored_buffers(plain):
    config = read_model_config(plain)
    values = buffer_values(build_skeleton(config))
    model = construct(config).bfloat16()
    assert all(dict(model.named_buffers())[name].dtype == torch.bfloat16 for name in values)
    restore_buffers(model, values)
    for name, value in values.items():
        assert torch.equal(dict(model.named_buffers())[name], value)


class TestRefusals:
    def test_no_config(self, tmp_path):
        with pytest.raises(DataError, match="has no config.json; check model.path"):
            read_model_config(tmp_path)

    @pytest.mark.parametrize(
        "text", ["{", json.dumps({"model_type": "no_such_model"}), json.dumps({"a": 1})]
    )
    def test_unusable_config(self, tmp_path, text: str):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(DataError) as caught:
            read_model_config(tmp_path)
        assert re.search(r"config.json (cannot be used|is not valid JSON)", str(caught.value))
        assert "\n" not in str(caught.value)

    def test_code_in_the_folder_is_never_run(self, tmp_path, plain):
        folder = tmp_path / "model"
        shutil.copytree(plain, folder)
        config = json.loads((folder / "config.json").read_text())
        config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "evil.py").write_text("open('exploded', 'w')\nclass Config: pass\n")
        with pytest.raises(ConfigError, match=r"Python code of its own \(evil.Config\)"):
            read_model_config(folder)
        assert not (tmp_path / "exploded").exists()

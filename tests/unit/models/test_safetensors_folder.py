"""Slices of safetensors: the right elements, and clear refusals."""

from __future__ import annotations

import json
import shutil

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from forgetscale.errors import DataError
from forgetscale.models import SafetensorsFolder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights")
    tensors = {
        "scalar": torch.tensor(3.5),
        "vector": torch.arange(7.0),
        "matrix": torch.arange(35.0).view(5, 7),
        "cube": torch.arange(24.0).view(2, 3, 4),
        "half": torch.arange(12.0).view(4, 3).bfloat16(),
    }
    safetensors.torch.save_file(tensors, path / "model.safetensors")
    return SafetensorsFolder(path), tensors


@given(st.data())
def test_any_slice(folder, data):
    reader, tensors = folder
    name = data.draw(st.sampled_from(sorted(tensors)))
    size = tensors[name].numel()
    start = data.draw(st.integers(0, size))
    length = data.draw(st.integers(0, size - start))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    found = reader.read_flat(name, start, length, dtype)
    assert found.dtype == dtype
    assert torch.equal(found, tensors[name].flatten()[start : start + length].to(dtype))


def test_stored_type_is_kept(folder):
    reader, _ = folder
    assert reader.read_flat("half", 1, 5).dtype == torch.bfloat16
    assert reader.shape("cube") == (2, 3, 4)
    assert "vector" in reader and "other" not in reader
    assert reader.names() == ["cube", "half", "matrix", "scalar", "vector"]


def test_several_files(tmp_path, plain):
    weights = safetensors.torch.load_file(plain / "model.safetensors")
    names = sorted(weights)
    parts = {"a.safetensors": names[:9], "b.safetensors": names[9:]}
    for file, some in parts.items():
        safetensors.torch.save_file({n: weights[n] for n in some}, tmp_path / file)
    index = {"weight_map": {n: file for file, some in parts.items() for n in some}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    reader = SafetensorsFolder(tmp_path)
    assert reader.files() == ["a.safetensors", "b.safetensors"]
    for name, weight in weights.items():
        assert torch.equal(reader.read_flat(name, 0, weight.numel()), weight.flatten())
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(DataError, match="names b.safetensors, which is not in the folder"):
        SafetensorsFolder(tmp_path)


class TestRefusals:
    def test_no_folder(self, tmp_path):
        with pytest.raises(DataError, match=r"model folder .*none does not exist"):
            SafetensorsFolder(tmp_path / "none")

    def test_no_safetensors(self, tmp_path):
        (tmp_path / "pytorch_model.bin").write_bytes(b"x")
        with pytest.raises(DataError, match="holds neither model.safetensors nor .*; save the"):
            SafetensorsFolder(tmp_path)

    def test_a_run_in_place_of_its_model(self, tmp_path):
        (tmp_path / "export").mkdir()
        with pytest.raises(DataError, match=rf"it is a run: name its model, {tmp_path}/export\."):
            SafetensorsFolder(tmp_path)

    @pytest.mark.parametrize("keep", [0, 4, 300])
    def test_cut_file(self, tmp_path, plain, keep: int):
        data = (plain / "model.safetensors").read_bytes()
        (tmp_path / "model.safetensors").write_bytes(data[:keep])
        with pytest.raises(DataError, match="is not readable safetensors"):
            SafetensorsFolder(tmp_path)

    @pytest.mark.parametrize("text", ["{", "{}", '{"weight_map": {"w": "../x.safetensors"}}'])
    def test_bad_index(self, tmp_path, text: str):
        (tmp_path / "model.safetensors.index.json").write_text(text)
        with pytest.raises(DataError) as caught:
            SafetensorsFolder(tmp_path)
        assert "\n" not in str(caught.value)

    def test_wrong_shapes(self, folder):
        reader, _ = folder
        reader.check_shapes({"matrix": (5, 7)})
        with pytest.raises(DataError, match=r"matrix has shape \[5, 7\], but .* \[7, 5\]"):
            reader.check_shapes({"matrix": (7, 5)})
        with pytest.raises(DataError, match="holds no tensor 'lost'"):
            reader.check_shapes({"lost": (1,)})


def test_hash_is_of_the_bytes(tmp_path, plain):
    shutil.copy(plain / "model.safetensors", tmp_path / "model.safetensors")
    before = SafetensorsFolder(tmp_path).hash_weight_file("model.safetensors")
    data = bytearray((tmp_path / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(bytes(data))
    assert SafetensorsFolder(tmp_path).hash_weight_file("model.safetensors") != before

"""A model folder with Python of its own: refused by one sentence, run and logged where named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from forgetscale.errors import ConfigError, DataError
from forgetscale.evaluation.model import load_model
from forgetscale.models import build_skeleton, read_model_config, trust_code, weights
from forgetscale.models.trust import code_references, is_trusted
from tests.distributed import tiny

CODE = """
from pathlib import Path
from transformers import Olmo2Config, Olmo2ForCausalLM
Path({ran!r}).touch()
class OwnConfig(Olmo2Config):
    model_type = "own-olmo"
class OwnForCausalLM(Olmo2ForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def coded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model of an architecture that only the Python file beside it knows."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "hf"))
    monkeypatch.syspath_prepend(str(tmp_path / "hf"))
    folder = tiny.make_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "own-olmo"
    config["architectures"] = ["OwnForCausalLM"]
    config["auto_map"] = {
        "AutoConfig": "own.OwnConfig",
        "AutoModelForCausalLM": "own.OwnForCausalLM",
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(CODE.format(ran=str(tmp_path / "ran")))
    return folder


def test_code_is_refused_then_run_and_logged_where_the_folder_is_named(coded: Path, tmp_path: Path):
    ran = tmp_path / "ran"
    for load in (read_model_config, load_model):
        with pytest.raises(ConfigError, match=r"needs Python code of its own \(own\.Own"):
            load(coded)
    assert not ran.exists() and not is_trusted(coded)
    lines: list[str] = []
    trust_code(coded, lines.append)
    assert len(lines) == 1 and "own.py may run (SHA-256 " in lines[0]
    skeleton = build_skeleton(read_model_config(coded))
    assert type(skeleton).__name__ == "OwnForCausalLM" and ran.exists()
    assert load_model(coded, dtype="float32", device="cpu").model.config.model_type == "own-olmo"
    assert weights.SafetensorsFolder(coded).names()


def test_code_beside_an_architecture_that_is_known_is_never_looked_at(coded: Path, tmp_path: Path):
    config = json.loads((coded / "config.json").read_text())
    (coded / "config.json").write_text(json.dumps(config | {"model_type": "olmo2"}))
    assert code_references(coded) == ["own.OwnConfig", "own.OwnForCausalLM"]
    assert type(build_skeleton(read_model_config(coded))).__name__ == "Olmo2ForCausalLM"
    assert not (tmp_path / "ran").exists()


def test_code_from_a_network_is_never_run(coded: Path):
    config = json.loads((coded / "config.json").read_text())
    config["auto_map"]["AutoConfig"] = "someone/else--own.OwnConfig"
    (coded / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="code from a network is never run"):
        trust_code(coded, print)
    (coded / "config.json").write_text("{")
    with pytest.raises(DataError, match="is not valid JSON"):
        read_model_config(coded)

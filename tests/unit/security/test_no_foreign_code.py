"""Nothing in the package reads a pickle, runs a file's code, or records a secret."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from forgetscale.artifact import (
    RECORDED_VARIABLES,
    provenance,
    recorded_environment,
    redacted,
    verify_artifact,
)
from forgetscale.config import load_recipe, paths_of, require_roots
from forgetscale.config.deepspeed import read_deepspeed
from forgetscale.errors import ConfigError, DataError
from forgetscale.zero3.floor import require_torch
from tests.distributed import tiny
from tests.distributed.harness import ROOT

SOURCES = sorted(
    path for name in ("forgetscale", "data_prep") for path in (ROOT / name).rglob("*.py")
)
BANNED_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
BANNED_CALLS = {"eval", "exec", "compile", "__import__"}


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def keywords(node: ast.Call) -> dict[str, str]:
    return {item.arg: ast.unparse(item.value) for item in node.keywords if item.arg}


def test_there_is_something_to_audit():
    assert len(SOURCES) > 100


def test_no_module_that_reads_pickles_is_imported():
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [item.name for item in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            found += [f"{path.name}: {n}" for n in names if n.split(".")[0] in BANNED_MODULES]
    assert not found


def test_torch_load_reads_weights_only_and_numpy_no_pickles():
    loads = 0
    for path in SOURCES:
        for name, node in calls(path):
            if name == "torch.load":
                loads += 1
                assert keywords(node).get("weights_only") == "True", f"{path}:{node.lineno}"
            if name in ("np.load", "numpy.load"):
                # numpy's own default since 1.16.3 is False
                assert keywords(node).get("allow_pickle") in (None, "False"), path
    assert loads >= 1


def test_yaml_is_read_by_the_safe_loader_that_refuses_repeated_keys():
    allowed = {"UniqueKeyLoader", "loader"}
    for path in SOURCES:
        for name, node in calls(path):
            if name in ("yaml.load", "yaml.load_all"):
                assert ast.unparse(node.args[1]) in allowed, f"{path}:{node.lineno}"
            assert name not in ("yaml.unsafe_load", "yaml.full_load", "yaml.safe_load"), path
    from forgetscale.config import UniqueKeyLoader
    from forgetscale.evaluation.harness import files

    assert issubclass(UniqueKeyLoader, yaml.SafeLoader)
    assert issubclass(files._TaskLoader, UniqueKeyLoader)


def test_models_and_tokenizers_never_bring_code_unless_they_are_named():
    """Every place where transformers could import code says so, and none says yes by itself."""
    loaders = ("AutoConfig", "AutoTokenizer", "AutoModelForCausalLM", "AutoModel")
    found = 0
    for path in SOURCES:
        for name, node in calls(path):
            given = keywords(node).get("trust_remote_code")
            assert given is None or given == "False" or given.startswith("is_trusted("), path
            if name.split(".")[0] in loaders and name.split(".")[-1].startswith("from_"):
                found += 1
                assert given is not None, f"{path}:{node.lineno} leaves trust_remote_code open"
    assert found >= 6


def test_no_text_is_run_as_code():
    found = [
        f"{path}:{node.lineno}"
        for path in SOURCES
        for name, node in calls(path)
        if name in BANNED_CALLS or name == "os.system" or keywords(node).get("shell") == "True"
    ]
    assert not found


def test_environment_is_recorded_by_a_list_of_names(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecretsecret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very secret")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert recorded_environment()["OMP_NUM_THREADS"] == "7"
    assert set(recorded_environment()) <= set(RECORDED_VARIABLES)
    assert "secret" not in json.dumps(recorded_environment())
    words = ("TOKEN", "SECRET", "PASS", "KEY", "CREDENTIAL", "AUTH")
    assert not [n for n in RECORDED_VARIABLES if any(w in n.split("_") for w in words)]


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("--set", "--set"),
        ("optim.lr=1e-4", "optim.lr=1e-4"),
        ("data/tokens=3", "data/tokens=3"),
        ("num_target_tokens=200", "num_target_tokens=200"),
        ("hub.token=abc", "hub.token=***"),
        ("--api-key=abc", "--api-key=***"),
        ("MY_PASSWORD: abc", "MY_PASSWORD: ***"),
        ("https://me:abc@host/x", "https://me:***@host/x"),
        ("hf_abcdefghijklmnop", "***"),
        ("x=ghp_abcdefghijklmnop123", "x=***"),
    ],
)
def test_secrets_are_taken_out_of_the_recorded_command(given: str, shown: str, monkeypatch):
    assert redacted([given]) == [shown]
    monkeypatch.setattr("sys.argv", ["forgetscale", given])
    assert provenance()["command"] == ["forgetscale", shown]


@pytest.mark.parametrize(
    ("version", "good"),
    [
        ("2.5.1", False),
        ("2.9.1+cu128", False),
        ("2.10.0", True),
        ("2.13.0+cpu", True),
        ("3.0", True),
    ],
)
def test_torch_below_the_floor_is_refused(version: str, good: bool):
    if good:
        require_torch(version)
    else:
        with pytest.raises(ConfigError, match=r"torch is .*, expected 2\.10 or newer"):
            require_torch(version)


def test_this_torch_is_new_enough():
    require_torch(torch.__version__)


def write_recipe(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


def good_recipe(folder: Path) -> dict:
    return tiny.base_recipe(folder, "run", kind="sft")


def test_a_recipe_with_a_python_object_or_a_repeated_key_is_refused(tmp_path: Path):
    text = yaml.safe_dump(good_recipe(tmp_path))
    ran = tmp_path / "ran"
    evil = f'evil: !!python/object/apply:os.mkdir ["{ran}"]\n'
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_recipe(write_recipe(tmp_path, text + evil))
    assert not ran.exists()
    with pytest.raises(ConfigError, match="key 'run' stands twice"):
        load_recipe(write_recipe(tmp_path, text + "run: {name: other}\n"))
    path = write_recipe(tmp_path, text)
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_recipe(path, ["run.name=!!python/name:os.system"])
    with pytest.raises(ConfigError, match="'a' stands twice"):
        load_recipe(path, ["run.name={a: 1, a: 2}"])


def test_a_deepspeed_file_with_a_repeated_key_is_refused(tmp_path: Path):
    path = tmp_path / "zero3.json"
    path.write_text('{"zero_optimization": {"stage": 3, "stage": 2}}')
    with pytest.raises(ConfigError, match="key 'stage' stands twice"):
        read_deepspeed(path)


def test_every_path_of_a_recipe_lies_below_its_roots(tmp_path: Path):
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    for folder in (inside, outside):
        folder.mkdir()
    values = good_recipe(inside)
    values["evaluate"] = {"tasks": ["recall"], "task_dir": str(inside / "tasks")}
    values["roots"] = [str(inside)]
    recipe = load_recipe(write_recipe(tmp_path, yaml.safe_dump(values)))
    names = {name for name, _ in paths_of(recipe)}
    assert {"run.output_dir", "model.path", "data.path", "deepspeed", "evaluate.task_dir"} <= names
    for field, path in (
        ("model.path", inside / ".." / "outside" / "model"),
        ("run.output_dir", outside / "run"),
    ):
        with pytest.raises(ConfigError, match=f"{field} is .*lies below none of the folders"):
            load_recipe(tmp_path / "run.yaml", [f"{field}={path}"])
    (inside / "model").symlink_to(outside)
    with pytest.raises(ConfigError, match="model.path is .* and lies below none"):
        load_recipe(tmp_path / "run.yaml")
    values.pop("roots")
    free = load_recipe(write_recipe(tmp_path, yaml.safe_dump(values)))
    with pytest.raises(ConfigError, match="that --root allows"):
        require_roots(free, [outside], "--root")
    require_roots(free, [], "--root")


def test_an_artefact_that_is_a_link_or_holds_more_is_refused_where_that_matters(tmp_path: Path):
    from forgetscale.artifact import ArtifactWriter

    with ArtifactWriter(tmp_path / "a", "thing") as writer:
        (writer.path / "x.bin").write_bytes(b"1")
    verify_artifact(tmp_path / "a", "thing", only=["x.bin"], closed=True)
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(DataError, match="is a symbolic link"):
        verify_artifact(tmp_path / "b", "thing", closed=True)
    (tmp_path / "a" / "evil.pt").write_bytes(b"1")
    verify_artifact(tmp_path / "a", "thing", only=["x.bin"])
    with pytest.raises(DataError, match="evil.pt is not listed"):
        verify_artifact(tmp_path / "a", "thing", only=["x.bin"], closed=True)
    (tmp_path / "a" / "evil.pt").unlink()
    (tmp_path / "a" / "evil.pt").symlink_to("/etc/hostname")
    with pytest.raises(DataError, match="is a symbolic link"):
        verify_artifact(tmp_path / "a", "thing", only=["x.bin"], closed=True)

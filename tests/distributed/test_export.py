"""Exports load in plain transformers and compute what the live engine computes."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from forgetscale.artifact import verify_artifact
from forgetscale.errors import DataError
from tests.distributed.harness import RankServer
from tests.distributed.runs import PROBE, Run, Runs, load_weights


def logits_of(folder, dtype: torch.dtype) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    with torch.no_grad():
        return model(torch.tensor(PROBE)).logits.float()


def assert_loads(run: Run, dtype: torch.dtype) -> None:
    found = logits_of(run.folder / "export", dtype)
    live = run.outcome.value["logits"]
    # The same kernels on the same bits: not even rounding may differ in bf16; fp32 matmuls of
    # another memory layout may.
    assert torch.allclose(found, live, rtol=0, atol=1e-5 if dtype == torch.float32 else 0)
    assert not torch.allclose(live, logits_of(run.world_folder / "model", dtype), atol=1e-2)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("method", ["ssu", "sft"])
def test_plain_transformers_computes_the_same(runs: Runs, method: str, size: int):
    assert_loads(runs.get(method, size), torch.float32)


@pytest.mark.parametrize("offload", [False, True])
def test_bf16(runs: Runs, offload: bool):
    world = runs.world("bf16", dtype=torch.bfloat16)
    run = runs.get("ssu", 2, world=world, offload=offload, model__dtype="bfloat16")
    assert_loads(run, torch.bfloat16)
    assert {w.dtype for w in run.export.values()} == {torch.bfloat16}
    assert json.loads((run.folder / "export" / "config.json").read_text())["dtype"] == "bfloat16"


def test_inputs_on_frozen_features_give_the_sources_bits(runs: Runs):
    run = runs.get("ssu", 2)
    for name, weight in run.export.items():
        frozen = run.frozen[name]
        if not name.endswith("_proj.weight"):
            continue
        columns = frozen.all(0)
        x = torch.randn(5, weight.shape[1], generator=torch.Generator().manual_seed(1)) * columns
        assert torch.equal(x @ weight.T, x @ run.source[name].T), name
        y = torch.randn(5, weight.shape[1], generator=torch.Generator().manual_seed(2))
        # What changed acts through the columns that may move, and through nothing else.
        drift = y.double() @ (weight - run.source[name]).double().T
        moving = y[:, ~columns].double() @ (weight - run.source[name])[:, ~columns].double().T
        assert torch.allclose(drift, moving, rtol=0, atol=1e-12) and drift.abs().max() > 1e-3


def test_tied_embeddings(runs: Runs):
    run = runs.get("ssu", 2, world=runs.world("tied", tied=True))
    assert "lm_head.weight" not in run.export
    assert_loads(run, torch.float32)


def test_every_rank_computes_the_same(runs: Runs):
    first, *others = [value["logits"] for value in runs.get("ssu", 3).outcome.values]
    assert all(torch.equal(first, other) for other in others)


def test_side_files_and_manifest(runs: Runs):
    run = runs.get("ssu", 2)
    export, source = run.folder / "export", run.world_folder / "model"
    for path in source.iterdir():
        if path.name not in ("model.safetensors", "config.json"):
            assert (export / path.name).read_bytes() == path.read_bytes(), path.name
    assert AutoTokenizer.from_pretrained(export).convert_tokens_to_ids("w7") == 7
    config = json.loads((export / "config.json").read_text())
    assert config | {"dtype": 0} == json.loads((source / "config.json").read_text()) | {"dtype": 0}
    manifest = verify_artifact(export, "model_export")
    assert manifest["payload"]["step"] == 6
    assert manifest["made_by"]["recipe"]["method"]["kind"] == "ssu"
    assert {"step", "plan_hash", "model_hash"} <= set(manifest["payload"])


@pytest.mark.parametrize("size", [1, 2])
def test_several_files(ranks: RankServer, runs: Runs, tmp_path, size: int):
    folder = tmp_path / "export"
    recipe = runs.recipe("sharded")
    ranks.must("export:sharded", size, recipe=recipe, directory=str(folder), max_file_bytes=20_000)
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 3
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    source = load_weights(runs.world() / "model")
    assert set(index["weight_map"]) == set(source)
    assert index["metadata"]["total_size"] == sum(w.numel() * 4 for w in source.values())
    found = load_weights(folder)
    assert all(torch.equal(found[name], weight) for name, weight in source.items())
    assert torch.equal(
        logits_of(folder, torch.float32), logits_of(runs.world() / "model", torch.float32)
    )
    # A folder in several files is a source model like any other.
    changed = {**recipe, "model": {**recipe["model"], "path": str(folder)}}
    again = tmp_path / "again"
    ranks.must("export:sharded", 1, recipe=changed, directory=str(again), max_file_bytes=10**9)
    assert all(torch.equal(load_weights(again)[name], w) for name, w in source.items())


@pytest.mark.parametrize("rank", [0, 1])
def test_disk_full_leaves_the_old_export(ranks: RankServer, runs: Runs, tmp_path, rank: int):
    folder = tmp_path / "export"
    options = {"recipe": runs.recipe("full-export"), "directory": str(folder)}
    ranks.must("export:sharded", 2, **options, max_file_bytes=10**9)
    before = (folder / "model.safetensors").read_bytes()
    outcome = ranks.run("export:sharded", 2, **options, max_file_bytes=20_000, full_on=rank)
    assert not outcome.late and outcome.codes == [1, 1]
    for message in outcome.errors:
        assert f"rank {rank} cannot write the export" in message and "\n" not in message
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    assert (folder / "model.safetensors").read_bytes() == before
    verify_artifact(folder, "model_export")


def test_a_foreign_folder_is_not_replaced(ranks: RankServer, runs: Runs, tmp_path):
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "thesis.tex").write_text("x")
    options = {"recipe": runs.recipe("foreign-export"), "directory": str(folder)}
    outcome = ranks.run("export:sharded", 2, **options, max_file_bytes=10**9)
    assert outcome.codes == [2, 2], outcome.logs[0][-1500:]
    assert "thesis.tex" in {path.name for path in folder.iterdir()}


class TestCommand:
    def test_export_of_the_newest_checkpoint(self, ranks: RankServer, runs: Runs, tmp_path):
        run = runs.get("ssu", 2)
        output = tmp_path / "again"
        outcome = ranks.must("export:command", 2, recipe=run.recipe, output=str(output))
        found = load_weights(output)
        assert all(torch.equal(found[name], weight) for name, weight in run.export.items())
        assert "freeze audit compared" in outcome.logs[0]

    def test_no_checkpoint(self, ranks: RankServer, runs: Runs, tmp_path):
        run = runs.get("ssu", 1)
        copy = run.folder.with_name("without-checkpoints")
        shutil.copytree(run.folder, copy)
        shutil.rmtree(copy / "checkpoints")
        recipe = {**run.recipe, "run": {**run.recipe["run"], "output_dir": str(copy)}}
        outcome = ranks.run("export:command", 1, recipe=recipe, output=str(tmp_path / "x"))
        assert outcome.codes == [1]
        assert "holds no good checkpoint; train first" in outcome.errors[0]
        assert not (tmp_path / "x").exists()


def test_a_flipped_bit_in_an_export_is_noticed(runs: Runs, tmp_path):
    folder = tmp_path / "export"
    shutil.copytree(runs.get("ssu", 1).folder / "export", folder)
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-5] ^= 1
    (folder / "model.safetensors").write_bytes(bytes(data))
    with pytest.raises(DataError, match="model.safetensors has other content"):
        verify_artifact(folder, "model_export")

"""Divergence of two tiny models against the formula on plain forward passes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from forgetscale.cli import main
from forgetscale.errors import ConfigError
from forgetscale.knowledge import kl_logits
from forgetscale.knowledge.token_kl import MEASURES, Comparison, read_items, token_kl_part
from forgetscale.models import streamed as streamed_models
from tests.distributed import tiny


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("pair")
    return tiny.make_model(root / "s", seed=0), tiny.make_model(root / "t", seed=1)


def run(pair, items, output: Path, *options) -> dict:
    path = output.with_suffix(".jsonl")
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    given = ["--source", pair[0], "--tuned", pair[1], "--prompts", path, "--output", output]
    assert main(["analyze", "--token-kl", *map(str, (*given, *options))]) == 0
    return json.loads((output / "token_kl.json").read_text())


def logits(folder: Path, ids: list[int]) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].double()


def reference(tuned: torch.Tensor, source: torch.Tensor, k: int) -> float:
    total = 0.0
    for mine, theirs in zip(tuned, source, strict=True):
        ids = mine.topk(k).indices
        p, q = mine[ids].softmax(0), theirs[ids].softmax(0)
        total += float((p * (p / q).log()).sum())
    return total / len(tuned)


def test_first_tokens_in_two_contexts(pair, tmp_path: Path):
    items = [{"prompt": "w5 w6 w7", "source_prompt": "w9 w8", "group": "a"}]
    found = run(pair, items, tmp_path / "out", "--kl-top-k", 5)
    wanted = reference(logits(pair[1], [5, 6, 7])[-1:], logits(pair[0], [9, 8])[-1:], 5)
    assert found["a"]["topk_kl"]["mean"] == pytest.approx(wanted, rel=1e-4)
    assert found["all"]["items"] == 1
    same = run(pair, items, tmp_path / "same", "--kl-top-k", 5, "--same-context")
    wanted = reference(logits(pair[1], [5, 6, 7])[-1:], logits(pair[0], [5, 6, 7])[-1:], 5)
    assert same["a"]["topk_kl"]["mean"] == pytest.approx(wanted, rel=1e-4)


def test_all_answer_tokens(pair, tmp_path: Path):
    items = [{"prompt": "w5 w6", "answer": "w31 w42 w53"}, {"prompt": "w4", "answer": "w3"}]
    size = tiny.VOCAB_SIZE
    found = run(pair, items, tmp_path / "out", "--kl-top-k", size, "--answer-tokens", "all")
    ids = [5, 6, 31, 42]  # no name begins with that of a special token
    wanted = reference(logits(pair[1], ids)[1:], logits(pair[0], ids)[1:], size)
    lines = (tmp_path / "out" / "items.jsonl").read_text().splitlines()
    row = json.loads(lines[0])
    assert row["topk_kl"] == pytest.approx(wanted, rel=1e-4)
    assert row["full_kl"] == pytest.approx(row["topk_kl"], rel=1e-4)
    assert row["tuned_mass"] == pytest.approx(1, abs=1e-5)
    assert found["all"]["items"] == 2 and found["all"]["full_kl"]["low"] > 0


def test_the_same_model_is_at_distance_zero(pair, tmp_path: Path):
    found = run((pair[0], pair[0]), [{"prompt": "w5 w6"}], tmp_path / "out")
    assert abs(found["all"]["full_kl"]["mean"]) < 1e-6


ITEMS = [
    {
        "prompt": f"w{5 + i} w6 w7",
        "source_prompt": f"w9 w{8 + i}",
        "answer": "w31 w42",
        "group": "a",
    }
    for i in range(7)
]


@pytest.fixture(scope="module")
def streamed(pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("kl") / "stream"
    run(pair, ITEMS, output, "--answer-tokens", "all", "--memory", "stream")
    return output


def rows_of(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "items.jsonl").read_text().splitlines()]


def test_layer_by_layer_gives_what_whole_models_give(pair, streamed: Path, tmp_path: Path):
    whole = tmp_path / "whole"
    run(pair, ITEMS, whole, "--answer-tokens", "all", "--memory", "resident")
    for mine, theirs in zip(rows_of(streamed), rows_of(whole), strict=True):
        for name in MEASURES:
            assert mine[name] == pytest.approx(theirs[name], rel=2e-5), name
    held = [
        json.loads((output / "manifest.json").read_text())["payload"]["holding"]
        for output in (streamed, whole)
    ]
    assert [item["memory"] for item in held] == ["stream", "resident"]
    sizes = [(folder / "model.safetensors").stat().st_size for folder in pair]
    assert 0.9 * sum(sizes) < held[0]["needed"] < sum(sizes)


def test_parts_and_groups_of_texts_do_not_change_a_bit(
    pair, streamed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Parts as two workers have them, and hidden states of two texts at a time."""
    monkeypatch.setattr(kl_logits, "STREAMED_TOKENS", 9)
    path = tmp_path / "items.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    items = read_items(path, need_answers=True)
    holding = kl_logits.Holding("stream", 4, 0, None)
    comparison = Comparison(*pair, all_tokens=True)
    found = [token_kl_part(part, comparison, items, holding)["values"] for part in (0, 1)]
    wanted = [[row[name] for name in MEASURES] for row in rows_of(streamed)]
    assert np.concatenate(found).tolist() == wanted


def test_what_fits_is_held_whole(pair, monkeypatch: pytest.MonkeyPatch):
    given = {"dtype": "auto", "num_items": 1000, "resident_part": 64, "ranks": 1}
    whole = kl_logits.choose_holding(pair, "auto", workers=1, **given)
    assert (whole.memory, whole.part) == ("resident", 64)
    monkeypatch.setattr(kl_logits, "free_host_memory", lambda: whole.needed * 2)
    assert kl_logits.choose_holding(pair, "auto", workers=1, **given).memory == "resident"
    narrow = kl_logits.choose_holding(pair, "auto", workers=2, **given)
    assert (narrow.memory, narrow.part) == ("stream", 500)
    config = json.loads((pair[0] / "config.json").read_text())
    assert config["model_type"] in streamed_models.STREAMED_KINDS
    monkeypatch.setattr(kl_logits, "STREAMED_KINDS", ())
    assert kl_logits.choose_holding(pair, "auto", workers=2, **given).memory == "resident"
    monkeypatch.setattr(streamed_models, "STREAMED_KINDS", ())
    with pytest.raises(ConfigError, match="use --memory resident"):
        kl_logits.choose_holding(pair, "stream", workers=1, **given)


def test_what_is_refused(pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "items.jsonl"
    path.write_text('{"prompt": "w5"}\n')
    given = ["analyze", "--token-kl", "--source", pair[0], "--tuned", pair[1], "--output",
             tmp_path / "out", "--prompts", path]  # fmt: skip
    assert main([*map(str, given), "--answer-tokens", "all"]) == 2
    assert "line 1 has no answer" in capsys.readouterr().err
    assert main([*map(str, given), "--kl-top-k", "1000"]) == 2
    assert "above the vocabulary" in capsys.readouterr().err

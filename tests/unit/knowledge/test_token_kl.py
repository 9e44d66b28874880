"""Divergence of two tiny models against the formula on plain forward passes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from forgetscale.cli import main
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


def test_what_is_refused(pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "items.jsonl"
    path.write_text('{"prompt": "w5"}\n')
    given = ["analyze", "--token-kl", "--source", pair[0], "--tuned", pair[1], "--output",
             tmp_path / "out", "--prompts", path]  # fmt: skip
    assert main([*map(str, given), "--answer-tokens", "all"]) == 2
    assert "line 1 has no answer" in capsys.readouterr().err
    assert main([*map(str, given), "--kl-top-k", "1000"]) == 2
    assert "above the vocabulary" in capsys.readouterr().err

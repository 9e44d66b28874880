"""``forgetscale analyze --landscape`` as users run it, on any number of ranks."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from forgetscale.data import TokenSet
from tests.distributed import tiny
from tests.distributed.harness import Outcome, RankServer
from tests.distributed.runs import Runs


@pytest.fixture(scope="module")
def data(runs: Runs) -> dict:
    path = tiny.make_sft_set(runs.world() / "landscape-chats", runs.world() / "model")
    return {"kind": "sft", "path": str(path), "document_mask": True}


def start(
    ranks: RankServer, runs: Runs, data: dict, name: str, *options: object, size: int = 1
) -> Outcome:
    folder = runs.world()
    recipe = runs.recipe(f"{name}-run", {"kind": "eaft", "top_k": 12}, {"data": data})
    path = tiny.write_recipe(folder / f"{name}.yaml", recipe)
    # The tiny model is sure of nothing: the border is put where some of its tokens are.
    arguments = ["analyze", "--landscape", "--config", path, "--sure-entropy", 4.07]
    arguments += ["--unlikely", 0.01, "--output", folder / name, *options]
    return ranks.run("cli:run", size, arguments=[str(part) for part in arguments])


def read(folder: Path) -> dict:
    return json.loads((folder / "landscape.json").read_text())


@pytest.fixture(scope="module")
def one(ranks: RankServer, runs: Runs, data: dict) -> dict:
    other = runs.world("other-model", seed=9) / "model"
    models = ["--models", f"source={runs.world() / 'model'}", f"other={other}"]
    for name, size in (("landscape", 1), ("landscape-3", 3)):
        outcome = start(ranks, runs, data, name, *models, size=size)
        assert outcome.codes == [0] * size, outcome.logs[0]
        assert "targets conflict with what source is sure of" in outcome.logs[0]
        assert "</html>" in (runs.world() / name / "landscape.html").read_text()
    return read(runs.world() / "landscape")


def test_the_same_on_three_ranks(runs: Runs, one: dict):
    other = read(runs.world() / "landscape-3")
    other.pop("made_by")
    assert other == {name: value for name, value in one.items() if name != "made_by"}


def test_numbers_are_those_of_the_models(runs: Runs, data: dict, one: dict):
    """Against transformers alone, in fp64, each document by itself."""
    token_set = TokenSet(data["path"])
    for view, world in zip(one["models"], ("plain", "other-model"), strict=True):
        model = AutoModelForCausalLM.from_pretrained(runs.world(world) / "model").double()
        log_prob, entropy, gates, pull = [], [], [], []
        for row in range(len(token_set)):
            ids, mask = token_set.read([row])[0], token_set.loss_mask([row])[0]
            lens = token_set.document_lens([row])[0].tolist()
            for text, wanted in zip(ids.split(lens), mask.split(lens), strict=True):
                with torch.no_grad():
                    log_p = model(text[None]).logits[0].log_softmax(-1)[:-1][wanted[1:]]
                label = text[1:][wanted[1:]]
                p = log_p.exp()
                log_prob += log_p.gather(1, label[:, None])[:, 0].tolist()
                entropy += (-(p * log_p).sum(-1)).tolist()
                top = log_p.topk(12, -1).values.softmax(-1)
                gates += (-(top * top.log()).sum(-1) / math.log(12)).tolist()
                pull += (p - torch.nn.functional.one_hot(label, 67)).norm(dim=1).tolist()
        assert view["num_tokens"] == len(log_prob)
        assert view["cross_entropy"] == pytest.approx(-sum(log_prob) / len(log_prob), rel=1e-5)
        assert view["mean_entropy"] == pytest.approx(sum(entropy) / len(entropy), rel=1e-5)
        assert view["mean_gate"] == pytest.approx(sum(gates) / len(gates), rel=1e-5)
        inside = [h <= 4.07 and p <= math.log(0.01) for h, p in zip(entropy, log_prob, strict=True)]
        conflict = view["quadrants"]["conflict"]
        assert conflict["tokens"] == pytest.approx(sum(inside) / len(inside)) and any(inside)
        mine = sum(value for value, hit in zip(pull, inside, strict=True) if hit)
        assert conflict["gradient"] == pytest.approx(mine / sum(pull), rel=1e-4)
        assert view["outside_envelope"] == 0


def test_samples_and_tokens_can_be_found_again(data: dict, one: dict):
    token_set = TokenSet(data["path"])
    sizes = [item["models"]["source"]["conflict_nats"] for item in one["texts"]]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 0
    for item in one["tokens"]:
        ids = token_set.read([item["row"]])[0].tolist()
        assert item["target"] == f"w{ids[item['place']]}"
        assert item["before"].split()[-1] == f"w{ids[item['place'] - 1]}"
        found = item["models"]["source"]
        assert found["probability"] <= 0.01 and found["entropy"] <= 4.07
        assert bool(token_set.loss_mask([item["row"]])[0, item["place"]])
    for item in one["texts"]:
        marked = [token for token in item["shown"] if token.get("quadrant") == "conflict"]
        assert len(marked) == item["models"]["source"]["conflicts"]


def test_export_of_the_run_is_the_second_model(ranks: RankServer, runs: Runs, data: dict):
    run = runs.get("sft", 1, data=data)
    path = tiny.write_recipe(runs.world() / "landscape-run.yaml", run.recipe)
    output = runs.world() / "landscape-run"
    arguments = ["analyze", "--landscape", "--config", path, "--output", output, "--max-rows", 8]
    outcome = ranks.run("cli:run", 2, arguments=[str(part) for part in arguments])
    assert outcome.codes == [0, 0], outcome.logs[0]
    found = read(output)
    assert [item["name"] for item in found["models"]] == ["source", "after"]
    assert found["num_rows"] == 8
    assert found["models"][0]["cross_entropy"] > found["models"][1]["cross_entropy"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--models", "source"], "--models 'source' is not of the form NAME=DIR."),
        (["--models", "a=x", "a=y"], "--models names one model twice: a=x, a=y."),
        (["--models", "a=nowhere"], "nowhere does not exist"),
        (["--max-rows", 0], "--max-rows and --list must be >= 1, got 0 and 20."),
        (["--unlikely", 1], "--unlikely in (0, 1), got 4.07 and 1.0."),
    ],
)
def test_one_sentence_for_a_mistake(
    ranks: RankServer, runs: Runs, data: dict, options: list, sentence: str
):
    outcome = start(ranks, runs, data, "landscape-wrong", *options, size=2)
    assert outcome.codes == [2, 2]
    assert any(sentence in log for log in outcome.logs), outcome.logs
    assert not (runs.world() / "landscape-wrong").exists()

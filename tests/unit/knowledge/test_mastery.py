"""The probe of a tiny model: draws, resumption, workers, and ranks against plain forward passes."""

from __future__ import annotations

import json
import math
import multiprocessing
import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from forgetscale.cli import main
from forgetscale.generation import worker as workers
from forgetscale.knowledge import continuations
from forgetscale.knowledge.facts import Fact
from forgetscale.knowledge.ranks import middle_rank, relation_objects, rivals
from tests.distributed import tiny

# no name begins with that of a special token, w0 to w2
WORDS = [f"w{i}" for i in (*range(3, 10), *range(30, tiny.VOCAB_SIZE))]
FACTS = [
    # the answer of the first fact is every word, of the second none
    {"id": "all", "subject": "w5", "relation": "r", "object": "w3", "aliases": WORDS},
    {"id": "none", "subject": "w6", "relation": "r", "object": "w41 w62"},
    *(
        {
            "id": f"f{i}",
            "subject": f"w{i}",
            "relation": "r" if i % 2 else "q",
            "object": f"w{i + 9}",
        }
        for i in range(30, 42)
    ),
]
TEMPLATES = {"r": ["w7 [X] w8", "[X] w9 w30"], "q": ["w4 w5 [X]"]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_model(tmp_path_factory.mktemp("m") / "model")


def command(model: Path, output: Path, *options) -> list[str]:
    folder = output.parent
    (folder / "facts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in FACTS))
    (folder / "templates.json").write_text(json.dumps(TEMPLATES))
    given = ["--facts", folder / "facts.jsonl", "--templates", folder / "templates.json"]
    given += ["--samples", 3, "--sample-tokens", 4, "--rank-candidates", 5, "--in-domain", "q"]
    if "--workers" not in options:
        given += ["--workers", 1]
    return [*map(str, ["analyze", "--mastery", "--model", model, *given, "--output", output]),
            *map(str, options)]  # fmt: skip


@pytest.fixture(scope="module")
def probed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("probe") / "out"
    assert main(command(model, output)) == 0
    return output


def rows_of(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "facts.jsonl").read_text().splitlines()]


def assert_same(one: Path, other: Path) -> None:
    for name in ("facts.jsonl", "mastery.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def test_hits_and_groups(probed: Path):
    rows = rows_of(probed)
    assert [row["total"] for row in rows[:3]] == [6, 6, 3] and rows[3]["total"] == 6
    assert rows[0]["hit_count"] >= 4 and rows[1]["group"] == 0
    assert len({text for samples in rows[0]["texts"] for text in samples}) > 1
    summary = json.loads((probed / "mastery.json").read_text())
    assert (
        summary["all"]["groups"]
        == np.bincount([row["group"] for row in rows], minlength=5).tolist()
    )
    assert summary["in_domain"]["facts"] == 6 and summary["relations"]["r"]["domain"] == "out"
    manifest = json.loads((probed / "manifest.json").read_text())
    assert manifest["payload"]["probe"]["batch_size"] == "16"
    assert not list(probed.parent.glob(".*"))


def test_slots_do_not_matter(model: Path, probed: Path, tmp_path: Path):
    assert main(command(model, tmp_path / "out", "--sample-batch", 5)) == 0
    assert_same(tmp_path / "out", probed)


def test_three_workers_write_the_same(model: Path, probed: Path, tmp_path: Path):
    assert continuations.sample_plan(sum(row["total"] for row in rows_of(probed))).first_shards == 3
    assert main(command(model, tmp_path / "w", "--workers", 3)) == 0
    assert_same(tmp_path / "w", probed)


@pytest.mark.long
def test_two_ranks_write_the_same(model: Path, probed: Path, tmp_path: Path):
    """Processes that share nothing but the folder; whichever is late still ends well."""
    with ProcessPoolExecutor(2, multiprocessing.get_context("forkserver")) as pool:
        ranks = ("--world-size", 2, "--rank")
        given = [command(model, tmp_path / "r", *ranks, n) for n in (0, 1)]
        done = [pool.submit(main, arguments) for arguments in given]
        assert [future.result() for future in done] == [0, 0]
    assert_same(tmp_path / "r", probed)


def test_a_probe_that_died_goes_on(
    model: Path, probed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """It dies in the middle of the second shard, with a journal; nothing is drawn twice."""
    monkeypatch.setattr(continuations, "_LEAST_SHARD", 16)
    monkeypatch.setattr(continuations, "_JOURNAL_ROWS", 1)
    finish, drawn = workers.Worker._finish, []

    def dies(self, dialogue) -> None:
        finish(self, dialogue)
        drawn.append(dialogue.sample_id)
        if len(drawn) == 23:
            raise RuntimeError("killed")

    monkeypatch.setattr(workers.Worker, "_finish", dies)
    with pytest.raises(RuntimeError, match="killed"):
        main(command(model, tmp_path / "out", "--sample-batch", 4))
    assert main(command(model, tmp_path / "out")) == 0
    total = sum(row["total"] for row in rows_of(probed))
    # the one that was being kept when it died may be lost
    assert total <= len(drawn) <= total + 1 and set(drawn) == set(range(total))
    assert_same(tmp_path / "out", probed)


def test_other_facts_do_not_change_the_draws(model: Path, probed: Path, tmp_path: Path):
    output = tmp_path / "out"
    arguments = command(model, output)
    (tmp_path / "facts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in FACTS[4:6]))
    assert main(arguments) == 0
    assert [row["texts"] for row in rows_of(output)] == [
        row["texts"] for row in rows_of(probed)[4:6]
    ]


def test_ranks_are_those_of_forward_passes(model: Path, probed: Path):
    whole = AutoModelForCausalLM.from_pretrained(model).eval()
    facts = [Fact(row["id"], row["subject"], row["relation"],
                  (row["object"], *row.get("aliases", []))) for row in FACTS]  # fmt: skip
    objects = relation_objects(facts)
    assert objects["r"][:2] == ["w3", "w40"]

    def log_probs(text: str) -> tuple[list[int], torch.Tensor]:
        ids = [int(word[1:]) for word in text.split()]
        with torch.no_grad():
            return ids, whole(torch.tensor([ids])).logits[0].double().log_softmax(-1)

    for fact, row in zip(facts, rows_of(probed), strict=True):
        wrong = rivals(fact, objects[fact.relation], 4)
        assert row["candidates"] == 1 + len(wrong) and not set(wrong) & set(fact.answers)
        for place, template in enumerate(TEMPLATES[fact.relation]):
            opening = template.replace("[X]", fact.subject)
            start = len(opening.split())
            means = []
            for answer in (fact.answers[0], *wrong):
                ids, scores = log_probs(f"{opening} {answer}")
                nats = [scores[n - 1, ids[n]] for n in range(start, len(ids))]
                means.append(float(sum(nats)) / len(nats))
            assert row["answer_ranks"][place] == 1 + sum(other > means[0] for other in means[1:])
            ids, scores = log_probs(f"{opening} {fact.answers[0]}")
            better = int((scores[start - 1] > scores[start - 1, ids[start]]).sum())
            assert row["first_token_ranks"][place] == 1 + better
    assert rivals(facts[0], objects["r"], 4) == ["w41 w62"], "all others are its aliases"


def test_equal_values_share_the_middle():
    assert middle_rank(1.0, np.array([2.0, 1.0, 1.0, 0.0])) == 3.0
    assert middle_rank(1.0, np.array([])) == 1.0
    assert middle_rank(-math.inf, np.array([-math.inf])) == 1.5


def test_rivals_do_not_hang_on_other_relations():
    facts = [Fact(str(i), "s", "r", (f"o{i}",)) for i in range(9)]
    some = rivals(facts[0], relation_objects(facts)["r"], 3)
    more = rivals(facts[0], relation_objects([*facts, Fact("x", "s", "q", ("p",))])["r"], 3)
    assert some == more and len(set(some) - {"o0"}) == 3


def test_what_is_refused(model: Path, probed: Path, tmp_path: Path, capsys):
    assert main(command(model, probed)) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(command(model, tmp_path / "out", "--rank-candidates", 1)) == 2
    assert "must be 0 (no ranks) or >= 2" in capsys.readouterr().err
    assert main(command(model, tmp_path / "out", "--sample-tokens", 62)) == 2
    assert "shorten the template or --sample-tokens" in capsys.readouterr().err


def test_damaged_models(model: Path, tmp_path: Path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    assert main(command(broken, tmp_path / "out")) == 2
    assert "no finite logits; its weights are damaged" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_engines_limits_are_told_in_this_commands_words(model: Path, tmp_path: Path, capsys):
    narrow = tmp_path / "narrow"
    shutil.copytree(model, narrow)
    config = json.loads((narrow / "config.json").read_text())
    config |= {"model_type": "olmo3", "sliding_window": 5, "layer_types": ["sliding_attention"] * 2}
    (narrow / "config.json").write_text(json.dumps(config))
    assert main(command(narrow, tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert "--sample-tokens 4 with --sample-batch 16: the model attends to 5 tokens back" in error

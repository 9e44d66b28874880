"""Whole runs with a real model: any workers write the same bytes, bad input is told."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pyarrow.parquet as pq
import pytest
import yaml

from data_prep.cli import main as data_prep_main
from forgetscale.artifact import read_manifest, verify_artifact
from forgetscale.cli.main import main
from forgetscale.config import validate_generate_recipe
from forgetscale.data import TokenSet
from forgetscale.errors import ConfigError, DataError, StoppedEarly
from forgetscale.generation import run as run_module
from forgetscale.generation.engines import choice
from forgetscale.generation.result import result_files, select
from forgetscale.generation.run import prepare, run_worker
from forgetscale.generation.status import read_status
from tests.distributed.harness import ROOT
from tests.unit.generation.fake import sealed_bytes


def recipe_values(talker, output, **changes):
    generate = {
        "output_dir": str(output),
        "num_dialogues": 40,
        "max_tokens": 80,
        "shard_size": 8,
        "over_generation": 1.0,
        "journal_rows": 2,
        "lease_seconds": 30.0,
        "engine": {"num_slots": 6},
        "filters": {"duplicates": "none", "min_user_characters": 9},
        "dialogue": {
            "kind": "pre_query",
            "user": {"temperature": 1.2, "top_p": 0.98, "max_new_tokens": 16},
            "assistant": {"temperature": 1.0, "top_p": 0.95, "max_new_tokens": 20},
        },
    }
    return {"model": {"path": str(talker), "dtype": "float32"}, "generate": generate | changes}


def recipe(talker, output, **changes):
    return validate_generate_recipe(recipe_values(talker, output, **changes))


def result_rows(folder):
    (file,) = result_files(folder / "dialogues")
    return pq.read_table(file).to_pylist()


@pytest.fixture(scope="module")
def alone(talker, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "run"
    payload = run_worker(recipe(talker, folder))
    return folder, payload


def test_the_result(alone):
    folder, payload = alone
    manifest = verify_artifact(folder / "dialogues", "dialogues")
    rows = result_rows(folder)
    assert len(rows) == payload["num_dialogues"] == 40
    ids = [row["sample_id"] for row in rows]
    assert ids == sorted(ids) and len(set(ids)) == 40
    assert all(row["state"] == "accepted" for row in rows)
    assert payload["num_accepted"] >= 40 and payload["num_ids"] > 40
    assert payload["num_supervised_tokens"] == sum(
        item["end"] - item["start"] for row in rows for item in row["supervised"]
    )
    assert payload["mean_nll"]["assistant"] > 0
    assert set(manifest["inputs"]) == {"model"}
    assert not list((folder / "journals").iterdir())
    status = read_status(folder)
    assert status.is_published and status.num_done == status.num_ids == payload["num_ids"]
    assert status.counts["accepted"] == payload["counts"]["accepted"]


def test_the_first_accepted_ids_whoever_finished_first(alone, talker):
    """More shards than needed change nothing: the same ids, as long as all dialogues are."""
    folder, _ = alone
    run = prepare(recipe(talker, folder))
    num_shards = run.plan.num_shards(run.store)
    whole = select(run.store, num_shards, run.recipe.generate)
    accepted = [
        sample.sample_id
        for shard in range(num_shards)
        for sample in run.store.read_shard(shard)
        if sample.state == "accepted"
    ]
    assert whole.ids == frozenset(accepted[:40])


@pytest.mark.parametrize(("workers", "slots"), [(2, 5), (3, 9), (7, 4)])
def test_several_workers_write_the_same_bytes(workers, slots, alone, talker, tmp_path):
    """In turn, as processes would: each begins, is stopped after some steps, the next goes on."""
    folder = tmp_path / "run"
    values = recipe(talker, folder, engine={"num_slots": slots})
    for number in range(workers):
        left = iter(range(12 + 5 * number if number < workers - 1 else 100_000))
        try:
            run_worker(values, should_stop=lambda left=left: next(left, None) is None)
        except StoppedEarly as error:
            assert error.exit_code == 75
    assert sealed_bytes(folder) == sealed_bytes(alone[0])
    name = "dialogues-00000-of-00001.parquet"
    found, wanted = (root / "dialogues" / name for root in (folder, alone[0]))
    assert found.read_bytes() == wanted.read_bytes()


def start(config):
    return subprocess.Popen(
        [sys.executable, "-m", "forgetscale", "generate", "--config", str(config)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.long
def test_processes_that_are_killed(alone, talker, tmp_path):
    """Two workers at once, one killed at a random moment of its work."""
    config = tmp_path / "self.yaml"
    folder = tmp_path / "run"
    config.write_text(yaml.safe_dump(recipe_values(talker, folder)))
    first, second = start(config), start(config)
    end = time.monotonic() + 60
    while not list(folder.glob("journals/*")) and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(random.Random(4).random() * 0.3)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    output, _ = second.communicate(timeout=120)
    assert second.returncode == 0, output
    assert json.loads(output.splitlines()[-1])["num_dialogues"] == 40
    assert sealed_bytes(folder) == sealed_bytes(alone[0])


def test_started_again_after_the_end_does_nothing(alone, talker, monkeypatch):
    monkeypatch.setattr(run_module, "open_engine", None)  # would fail if it were called
    assert run_worker(recipe(talker, alone[0])) == alone[1]


def test_another_recipe_or_model(alone, talker, tmp_path):
    with pytest.raises(ConfigError, match=r"recipe.seed differ"):
        run_worker(recipe(talker, alone[0], seed=43))
    copy = shutil.copytree(talker, tmp_path / "other")
    settings = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(settings | {"rms_norm_eps": 1e-5}))
    with pytest.raises(ConfigError, match=r"fingerprint.model differ"):
        run_worker(recipe(copy, alone[0]))
    # What does not change the text may change.
    prepare(recipe(talker, alone[0], engine={"num_slots": 9}, lease_seconds=5.0, journal_rows=4))


def test_a_model_that_only_ends_turns(talker, tmp_path, monkeypatch):
    def open_engine(values, stop_ids):
        engine = choice.open_engine(values, stop_ids)
        end = prepare(values).settings.layout.ends[0].stop_id
        forward = engine._forward

        def only_end(*arguments):
            logits = forward(*arguments)
            logits[..., end] = 1e4
            return logits

        engine._forward = only_end
        return engine

    monkeypatch.setattr(run_module, "open_engine", open_engine)
    with pytest.raises(DataError, match=r"only 0 of \d+ dialogues .* accepted \(rejected/empty"):
        run_worker(recipe(talker, tmp_path / "run"))


def test_answers_to_given_prompts(talker, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    lines = [{"id": f"q/{n}", "prompt": text} for n, text in enumerate(["Who?", "In year 3?"] * 3)]
    prompts.write_text("\n".join(map(json.dumps, lines)))
    dialogue = {
        "kind": "prompts",
        "path": str(prompts),
        "samples_per_prompt": 2,
        "assistant": {"temperature": 1.0, "max_new_tokens": 6},
    }
    values = recipe(talker, tmp_path / "run", dialogue=dialogue, num_dialogues=None)
    payload = run_worker(values)
    rows = result_rows(tmp_path / "run")
    assert payload["num_dialogues"] == len(rows) == 12
    assert [row["source_id"] for row in rows] == [line["id"] for line in lines] * 2
    assert all(row["messages"][-1]["role"] == "assistant" for row in rows)
    assert rows[0]["messages"][0]["content"] == "Who?"


def task_rows(tmp_path):
    path = tmp_path / "task.jsonl"
    rows = [
        {
            "id": str(number),
            "messages": [
                {"role": "user", "content": f"Who rules town {number}?"},
                {"role": "assistant", "content": f"It is ruled by {number}."},
            ],
        }
        for number in range(10)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path, rows


def test_answers_in_own_words_or_the_given_ones(talker, tmp_path):
    path, given = task_rows(tmp_path)
    dialogue = {
        "kind": "sdft",
        "path": str(path),
        "request": "{instruction} {answer}",
        "assistant": {"temperature": 1.0, "max_new_tokens": 20},
        "phrases": ["nobody"],
    }
    values = recipe(talker, tmp_path / "run", dialogue=dialogue, num_dialogues=None)
    payload = run_worker(values)
    rows = result_rows(tmp_path / "run")
    assert payload["num_dialogues"] == len(rows) == 10  # none is lost
    layout = prepare(values).settings.layout
    for row, source in zip(rows, given, strict=True):
        assert row["messages"][0] == source["messages"][0]
        answer = row["messages"][1]["content"]
        if row["reason"]:
            assert row["reason"].startswith("given_answer_")
            assert row["messages"] == source["messages"]
        else:
            assert "nobody" not in answer.lower() and answer != source["messages"][1]["content"]
        prompt = layout.prompt_ids(row["messages"][:1])
        assert row["input_ids"][: len(prompt)] == prompt
        assert row["supervised"] == [{"start": len(prompt), "end": len(row["input_ids"])}]
        assert layout.render(row["messages"]).startswith(layout.decode(row["input_ids"]))


@pytest.mark.parametrize(
    ("dialogue", "words"),
    [
        ({"kind": "prompts", "path": "missing.jsonl"}, "generate.dialogue.path: missing.jsonl"),
        ({"kind": "seed_topic", "topics": "missing.txt"}, "generate.dialogue.topics: missing.txt"),
    ],
)
def test_missing_files(dialogue, words, talker, tmp_path):
    number = None if dialogue["kind"] == "prompts" else 5
    values = recipe(talker, tmp_path / "run", dialogue=dialogue, num_dialogues=number)
    with pytest.raises(ConfigError, match=words):
        run_worker(values)


def test_the_command(alone, talker, tmp_path, capsys):
    assert main(["generate", "--status", str(alone[0])]) == 0
    assert "result published" in capsys.readouterr().out
    assert main(["generate"]) == 2
    assert main(["generate", "--status", str(tmp_path)]) == 2
    assert "is no folder of forgetscale generate" in capsys.readouterr().err
    config = tmp_path / "self.yaml"
    config.write_text(yaml.safe_dump(recipe_values(talker, alone[0])))
    assert main(["generate", "--config", str(config)]) == 0
    assert json.loads(capsys.readouterr().out)["num_dialogues"] == 40
    assert main(["generate", "--config", str(config), "--set", "model.path=nowhere"]) == 2
    assert "nowhere is no Hugging Face model folder" in capsys.readouterr().err
    assert read_manifest(alone[0] / "dialogues")["kind"] == "dialogues"


def test_what_was_written_is_what_is_trained_on(alone, talker, tmp_path):
    """Generated tokens to SFT rows: the same ids, and targets where the model answered."""
    folder, payload = alone
    arguments = ["--input", str(folder / "dialogues"), "--tokenizer", str(talker)]
    shape = ["--block-size", "80", "--packing", "none", "--output", str(tmp_path / "rows")]
    assert data_prep_main(["build", "--sft", *arguments, *shape]) == 0
    rows = TokenSet(tmp_path / "rows")
    assert rows.num_documents == rows.num_rows == 40
    assert (
        rows.manifest["payload"]["supervision"]["num_supervised_tokens"]
        == (payload["num_supervised_tokens"])
    )
    lens = rows.document_lens(range(40))[:, 0].tolist()
    for number, row in enumerate(result_rows(folder)):
        ids = rows.read([number])[0, : lens[number]].tolist()
        mask = rows.loss_mask([number])[0].nonzero().flatten().tolist()
        assert ids == row["input_ids"]
        assert mask == [n for item in row["supervised"] for n in range(item["start"], item["end"])]

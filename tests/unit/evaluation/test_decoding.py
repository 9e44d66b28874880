"""Beams and sampling of a task's own: as transformers decodes them, one prompt at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from forgetscale.errors import ConfigError, DataError
from forgetscale.evaluation import Decoding, EvaluationOptions, evaluate_model, load_chat_task
from forgetscale.evaluation.collective import SingleProcess
from forgetscale.evaluation.decoding import read_task_decoding
from forgetscale.evaluation.generate import Answer, generate_answers, plain_generation_config
from forgetscale.evaluation.harness.backends import FolderBackend, Generation
from forgetscale.evaluation.live import LiveEvaluator
from forgetscale.evaluation.model import LoadedModel, load_model
from forgetscale.evaluation.prompts import ChatPrompts

FP32 = EvaluationOptions(dtype="float32", device="cpu")
QUESTIONS = ["lo?", "where is ro?", "unseen words?", "what is fi then?", "gu?", "ab ab ab?", "k"]


@pytest.fixture(scope="module")
def loaded(model_dir: Path) -> LoadedModel:
    """The tiny chat model, less sure of itself, so that beams differ from greedy answers."""
    found = load_model(model_dir, dtype="float32", device="cpu")
    with torch.no_grad():
        found.model.get_output_embeddings().weight.mul_(0.2)
    return found


def one_by_one(
    loaded: LoadedModel, rows: list[list[int]], stop_ids: list[int], **settings: Any
) -> list[list[int]]:
    """What transformers makes of each prompt alone, up to what ends it."""
    config = plain_generation_config(
        max_new_tokens=12, eos_token_id=stop_ids, pad_token_id=0, **settings
    )
    made = []
    for row in rows:
        ids = torch.tensor([row])
        whole = loaded.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config
        )
        made.append(whole[0, len(row) :].tolist())
    return made


@pytest.mark.parametrize("beams", [2, 5])
def test_beams_are_those_of_transformers(loaded: LoadedModel, beams: int) -> None:
    prompts = ChatPrompts(loaded.tokenizer)
    rows = [prompts.prompt_ids([{"role": "user", "content": text}]) for text in QUESTIONS]
    stop_ids = prompts.stop_ids()

    def ours(decoding: Decoding, batch_size: int) -> list[Answer]:
        return generate_answers(
            loaded.model,
            prompts,
            rows,
            collective=SingleProcess(),
            batch_size=batch_size,
            max_new_tokens=12,
            stop_ids=stop_ids,
            decoding=decoding,
            seed=0,
        )

    expected = []
    for ids in one_by_one(loaded, rows, stop_ids, num_beams=beams):
        ends = [place for place, token in enumerate(ids) if token in stop_ids]
        expected.append(Answer(prompts.decode(ids[: ends[0]] if ends else ids), bool(ends)))
    for batch_size in (1, 3, 7):
        assert ours(Decoding(beams=beams), batch_size) == expected
    assert ours(Decoding(), 7) != expected, "the test needs beams to matter"


def test_beams_of_a_harness_task_end_at_a_text(loaded: LoadedModel) -> None:
    """``until`` ends a beam as a token that ends an answer would: the same beams win."""
    backend = FolderBackend(loaded.model, loaded.tokenizer)
    rows = [loaded.tokenizer.encode(text, add_special_tokens=False) for text in QUESTIONS]
    ended = 0
    for end in "lmvy":  # in the name of no special token
        (end_id,) = loaded.tokenizer.encode(end, add_special_tokens=False)
        # Twice the same token: transformers keeps more candidates the more tokens can end a text.
        settings = Generation(Decoding(beams=4), 12, (end,), (3, 3), 0, seed=0, number=0)
        found = backend.decode(rows, settings, dummy=False)
        expected = one_by_one(loaded, rows, [3, end_id], num_beams=4)
        pads = [ids + [0] * (max(map(len, found)) - len(ids)) for ids in expected]
        assert [ids[: len(made)] for ids, made in zip(pads, found, strict=True)] == found
        ended += sum(end_id in ids for ids in found)
    assert ended


def test_beams_with_sampling_depend_on_the_seed_alone(loaded: LoadedModel) -> None:
    backend = FolderBackend(loaded.model, loaded.tokenizer)
    rows = [loaded.tokenizer.encode(text, add_special_tokens=False) for text in QUESTIONS[:2]]
    decoding = Decoding(temperature=0.8, top_p=0.9, top_k=40, repetition_penalty=1.1, beams=5)

    def decode(seed: int) -> list[list[int]]:
        settings = Generation(decoding, 8, ("zz",), (3,), 0, seed=seed, number=1)
        return backend.decode(rows, settings, dummy=False)

    first = decode(1)
    torch.manual_seed(99)
    assert decode(1) == first and decode(2) != first


ROW = {
    "id": "a",
    "kind": "refusal",
    "messages": [{"role": "user", "content": "lo?"}],
    "meta": {"refusals": ["mi"]},
}


def write(folder: Path, text: str, row: dict[str, Any] = ROW) -> Path:
    (folder / "t.jsonl").write_text(json.dumps(row) + "\n")
    path = folder / "t.yaml"
    path.write_text(text)
    return path


def test_a_task_says_how_its_answers_are_decoded(model_dir: Path, tmp_path: Path) -> None:
    path = write(tmp_path, "max_new_tokens: 2\nbeams: 3\n")
    task = load_chat_task(tmp_path, "t")
    assert task.decoding is not None and task.decoding.decoding == Decoding(beams=3)
    evaluate_model(model_dir, ["t"], tmp_path, tmp_path / "out", options=FP32)
    settings = json.loads((tmp_path / "out" / "results.json").read_text())["settings"]
    assert settings["decoding_of_tasks"]["t"]["max_new_tokens"] == 2
    assert settings["max_new_tokens"] == 64 and settings["decoding"]["beams"] == 1
    from forgetscale.evaluation.results import read_samples

    (sample,) = read_samples(tmp_path / "out")
    assert (sample.answer, sample.finish) == ("mi", "length")
    path.unlink()
    assert load_chat_task(tmp_path, "t").task_hash != task.task_hash, "another way, another task"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("beam: 3\n", "unknown key 'beam'; nearest valid key: 'beams'"),
        ("beams: 0\n", "beams must be >= 1, got 0"),
        ("beams: true\n", "beams is True, expected a number"),
        ("top_p: high\n", "top_p is 'high', expected a number"),
        ("top_p: 2\n", "top_p in"),
        ("max_new_tokens: 0\n", "max_new_tokens must be > 0"),
        ("beams: 1\nbeams: 2\n", "stands twice"),
        ("x: !!python/object/apply:os.getcwd []\n", "is not safe YAML"),
        ("[1]\n", "expected fields such as"),
    ],
)
def test_a_decoding_that_cannot_be_is_named(tmp_path: Path, text: str, sentence: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(DataError, match=sentence) as caught:
        read_task_decoding(path)
    assert str(path) in str(caught.value)


def test_answers_that_are_scored_have_no_decoding(tmp_path: Path) -> None:
    exact = {key: ROW[key] for key in ("id", "messages")} | {"kind": "exact", "answers": ["a"]}
    write(tmp_path, "beams: 3\n", exact)
    with pytest.raises(DataError, match="are scored, not decoded"):
        load_chat_task(tmp_path, "t")


def test_beams_are_left_to_the_export(loaded: LoadedModel, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="pip install 'forgetscale[eval]'")
    folder = tmp_path / "lm_eval"
    folder.mkdir()
    (folder / "rows.jsonl").write_text('{"text": "lo"}\n')
    (folder / "beams.yaml").write_text(
        "task: beams\ndataset_path: json\ntest_split: test\noutput_type: generate_until\n"
        "dataset_kwargs: {data_files: {test: rows.jsonl}}\n"
        'doc_to_text: "{{text}}"\ndoc_to_target: "{{text}}"\n'
        "generation_kwargs: {until: [], num_beams: 2}\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    )
    with pytest.raises(ConfigError, match="decodes with num_beams 2, which a model that is being"):
        LiveEvaluator(["lm_eval/beams"], tmp_path, loaded.tokenizer)

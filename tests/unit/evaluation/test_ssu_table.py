"""The task files for the SSU paper's table: each can be read and made, and asks as published."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from forgetscale.evaluation import Decoding, EvaluationOptions, evaluate_model
from forgetscale.evaluation.degradation import is_target
from forgetscale.evaluation.harness import harness_names, read_harness_file
from forgetscale.evaluation.harness.task import load_harness
from forgetscale.evaluation.results import read_samples
from forgetscale.evaluation.tasks import load_chat_task
from tests.distributed.harness import ROOT

pytest.importorskip("lm_eval", reason="pip install 'forgetscale[eval]'")

TABLE = ROOT / "launch" / "recipes" / "ssu_table"
CHOICES = {"mmlu": 5, "mmlu_target": 5, "belebele_source": 3, "belebele_target": 3}
TEXTS = {
    "source_to_target": 3,
    "target_to_source": 3,
    "summarize_source": 0,
    "summarize_target": 0,
}
SHOTS = {**CHOICES, "gsm8k": 5, **TEXTS}
CHOICE = {"question": "lo?", "choices": ["a", "b", "c", "d"], "answer": 1, "flores_passage": "ab"}
CHOICE |= {f"mc_answer{n}": f"x{n}" for n in range(1, 5)}


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """The folder with rows for every file it names."""
    folder = tmp_path / "table"
    shutil.copytree(TABLE, folder)
    data = folder / "lm_eval" / "data"
    data.mkdir()
    rows: dict[str, dict[str, Any]] = {
        **dict.fromkeys(CHOICES, CHOICE),
        "gsm8k": {"question": "lo?", "answer": "so #### 4"},
        "flores": {"source": "lo?", "target": "mika", "ask_target": "ve?", "ask_source": "gu?"},
        "xlsum_source": {"text": "lo?", "summary": "mika"},
        "xlsum_target": {"text": "lo?", "summary": "mika", "ask": "ve?"},
    }
    for name, row in rows.items():
        if name in ("flores", "xlsum_source", "xlsum_target"):
            (data / f"{name}.jsonl").write_text((json.dumps(row) + "\n") * 501)
        else:
            (data / f"{name}.jsonl").write_text((json.dumps(row) + "\n") * 2)
        (data / f"{name}_dev.jsonl").write_text((json.dumps(row) + "\n") * 5)
    return folder


class Tokens:
    """Enough of a tokenizer to make a task."""

    eos_token_id = 3

    def __call__(self, text: str, **options: Any) -> dict[str, list[str]]:
        return {"input_ids": list(text)}


def test_every_task_of_the_table_can_be_made(table: Path) -> None:
    assert harness_names(table) == sorted(f"lm_eval/{name}" for name in SHOTS)
    for name, shots in SHOTS.items():
        file = read_harness_file(table, f"lm_eval/{name}")
        assert file.config.get("num_fewshot", 0) == shots and not file.code
        task = load_harness(table, f"lm_eval/{name}", Tokens(), max_length=4096, stop_ids=[3])
        assert task.num_items == (500 if name in TEXTS else 2)


def test_sampling_is_that_of_the_paper(table: Path) -> None:
    kwargs = read_harness_file(table, "lm_eval/gsm8k").config["generation_kwargs"]
    names = ("temperature", "top_p", "top_k", "repetition_penalty")
    assert [kwargs[name] for name in names] == [0.8, 0.8, 40, 1.1]
    for task in TEXTS:
        kwargs = read_harness_file(table, f"lm_eval/{task}").config["generation_kwargs"]
        assert [kwargs[name] for name in names] == [0.8, 0.9, 40, 1.1]
        assert (kwargs["num_beams"], kwargs["max_gen_toks"], kwargs["until"]) == (5, 128, ["\n"])


def test_the_rows_beside_them_are_tasks_of_ours() -> None:
    assert load_chat_task(TABLE, "mixing").kind == "language_mixing"
    task = load_chat_task(TABLE, "ifeval")
    assert task.kind == "ifeval" and task.decoding is not None
    assert task.decoding.max_new_tokens == 1280
    assert task.decoding.decoding == Decoding(0.8, 0.8, 40, 1.1)


def test_the_readme_names_every_task() -> None:
    text = (TABLE / "README.md").read_text()
    for name in SHOTS:
        assert f"`lm_eval/{name}`" in text, name


def test_target_tasks_and_translation_stay_out_of_the_average() -> None:
    names = {f"lm_eval/{name}" for name in SHOTS}
    averaged = {"mmlu", "belebele_source", "gsm8k", "summarize_source"}
    assert {name for name in names if not is_target(name)} == {f"lm_eval/{n}" for n in averaged}


def test_texts_are_decoded_with_beams_and_scored_as_sentences_and_corpus(
    model_dir: Path, table: Path, tmp_path: Path
) -> None:
    sacrebleu = pytest.importorskip("sacrebleu", reason="pip install 'forgetscale[eval]'")
    rows = [("lo?", "mika"), ("where is ro?", "ta na"), ("ve?", "su su"), ("gu?", "pelo")]
    long = {"text": "lo? " * 10, "summary": "left out"}
    lines = [json.dumps(long)]
    lines += [json.dumps({"text": text, "summary": summary}) for text, summary in rows]
    path = table / "lm_eval" / "data" / "xlsum_source.jsonl"
    path.write_text("\n".join(lines))
    file = table / "lm_eval" / "_text.yaml"
    file.write_text(file.read_text().replace("max_gen_toks: 128", "max_gen_toks: 10"))
    file = table / "lm_eval" / "summarize_source.yaml"
    text = file.read_text().replace("Summarize the text in one sentence.\\n", "")
    file.write_text(text.replace("rows: 500", "rows: 4"))
    found = evaluate_model(
        model_dir,
        ["lm_eval/summarize_source"],
        table,
        tmp_path / "out",
        batch_size=3,
        options=EvaluationOptions(dtype="float32", device="cpu"),
    )
    samples = read_samples(tmp_path / "out")
    answers, references = [row.answer or "" for row in samples], [summary for _, summary in rows]
    metric = sacrebleu.CHRF(word_order=2)
    expected = {
        "chrf++": metric.corpus_score(answers, [references]).score,
        "chrf++_sentence": sum(row.value for row in samples) / len(rows),
    }
    assert {item.metric: item.value for item in found} == pytest.approx(expected)
    assert [row.value for row in samples] == pytest.approx(
        [metric.sentence_score(a, [r]).score for a, r in zip(answers, references, strict=True)]
    )
    assert 0 < expected["chrf++"] < 100
    assert all(item.low < item.value < item.high and item.higher_is_better for item in found)
    settings = json.loads((tmp_path / "out" / "results.json").read_text())["settings"]
    assert settings["chrf"].startswith("nrefs:1|case:mixed|eff:yes|nc:6|nw:2")


def test_a_choice_of_the_table_is_measured_through_the_chat_template(
    model_dir: Path, table: Path, tmp_path: Path
) -> None:
    path = table / "lm_eval" / "belebele_source.yaml"
    path.write_text(path.read_text().replace("num_fewshot: 3", "num_fewshot: 1"))
    (found,) = evaluate_model(
        model_dir,
        ["lm_eval/belebele_source"],
        table,
        tmp_path / "out",
        options=EvaluationOptions(dtype="float32", device="cpu"),
    )
    assert (found.metric, found.n) == ("acc", 2)
    import pyarrow.parquet as pq

    prompt = pq.read_table(tmp_path / "out" / "samples.parquet")["prompt"][0].as_py()
    assert prompt.count("<|user|>") == 2, "the example is a turn of its own"
    assert prompt.endswith("<|assistant|>")

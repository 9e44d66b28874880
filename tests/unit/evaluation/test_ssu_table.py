"""The task files for the SSU paper's table: each can be read and made, and asks as published."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from forgetscale.evaluation import EvaluationOptions, evaluate_model
from forgetscale.evaluation.harness import harness_names, read_harness_file
from forgetscale.evaluation.harness.task import load_harness
from forgetscale.evaluation.tasks import load_chat_task
from tests.distributed.harness import ROOT

pytest.importorskip("lm_eval", reason="pip install 'forgetscale[eval]'")

TABLE = ROOT / "launch" / "recipes" / "ssu_table"
SHOTS = {"mmlu": 5, "global_mmlu": 5, "belebele_source": 3, "belebele_target": 3, "gsm8k": 5}
CHOICE = {"question": "lo?", "choices": ["a", "b", "c", "d"], "answer": 1, "flores_passage": "ab"}
CHOICE |= {f"mc_answer{n}": f"x{n}" for n in range(1, 5)}


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """The folder with rows for every file it names."""
    folder = tmp_path / "table"
    shutil.copytree(TABLE, folder)
    data = folder / "lm_eval" / "data"
    data.mkdir()
    for name in SHOTS:
        row: dict[str, Any] = (
            {"question": "lo?", "answer": "so #### 4"} if name == "gsm8k" else CHOICE
        )
        (data / f"{name}.jsonl").write_text((json.dumps(row) + "\n") * 2)
        (data / f"{name}_dev.jsonl").write_text((json.dumps(row) + "\n") * 5)
    return folder


class Tokens:
    """Enough of a tokenizer to make a task."""

    eos_token_id = 3


def test_every_task_of_the_table_can_be_made(table: Path) -> None:
    assert harness_names(table) == sorted(f"lm_eval/{name}" for name in SHOTS)
    for name, shots in SHOTS.items():
        file = read_harness_file(table, f"lm_eval/{name}")
        assert file.config["num_fewshot"] == shots and not file.code
        task = load_harness(table, f"lm_eval/{name}", Tokens(), max_length=4096, stop_ids=[3])
        assert task.num_items == 2


def test_sampling_is_that_of_the_paper(table: Path) -> None:
    kwargs = read_harness_file(table, "lm_eval/gsm8k").config["generation_kwargs"]
    found = [kwargs[name] for name in ("temperature", "top_p", "top_k", "repetition_penalty")]
    assert found == [0.8, 0.8, 40, 1.1]


def test_the_rows_beside_them_are_tasks_of_ours() -> None:
    assert load_chat_task(TABLE, "translate").kind == "chrf"
    assert load_chat_task(TABLE, "mixing").kind == "language_mixing"


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

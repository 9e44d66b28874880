import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from forgetscale.artifact import verify_artifact
from forgetscale.errors import DataError
from forgetscale.evaluation import Decoding, EvaluationOptions, evaluate_model, read_results
from forgetscale.evaluation.generate import generate_answers
from forgetscale.evaluation.model import load_model
from forgetscale.evaluation.prompts import ChatPrompts
from forgetscale.evaluation.tasks import load_chat_task

ALL_TASKS = [
    "recall",
    "compliance",
    "refusal",
    "no_refusal",
    "code_mixing",
    "perplexity/source",
    "perplexity/target",
]
FP32 = EvaluationOptions(dtype="float32", device="cpu")


def samples(directory: Path, task: str) -> dict[str, dict[str, Any]]:
    rows = pq.read_table(directory / "samples.parquet").to_pylist()
    return {row["id"]: row for row in rows if row["task"] == task}


def test_full_evaluation_judges_every_kind(model_dir: Path, task_dir: Path, tmp_path: Path) -> None:
    output = tmp_path / "result"
    results = evaluate_model(
        model_dir, ALL_TASKS, task_dir, output, batch_size=4, max_new_tokens=20, options=FP32
    )
    assert read_results(output) == results
    values = {(result.task, result.metric): result for result in results}
    answers = {key: row["answer"] for key, row in samples(output, "compliance").items()}
    assert "ta ne" in answers.values() and "sorry no" in answers.values(), answers
    share = sum(answer.startswith("ta ") for answer in answers.values()) / len(answers)
    assert values["compliance", "accuracy"].value == pytest.approx(share)
    refused = sum(answer.startswith("sorry") for answer in answers.values()) / len(answers)
    assert values["refusal", "rate"].value == pytest.approx(refused)
    assert values["refusal", "rate"].higher_is_better
    assert values["no_refusal", "rate"].value == pytest.approx(refused)
    assert not values["no_refusal", "rate"].higher_is_better
    mixed = sum("pelo" in answer.split() for answer in answers.values()) / len(answers)
    assert mixed > 0
    assert values["code_mixing", "rate"].value == pytest.approx(mixed)
    assert values["code_mixing", "rate"].kind == "code_mixing"
    manifest = verify_artifact(output, "result")
    assert manifest["inputs"]["recall"] == values["recall", "accuracy"].task_hash
    stored = json.loads((output / "results.json").read_text())
    assert stored["settings"]["dtype"] == "float32"
    assert len(samples(output, "perplexity/target")) == 5


def test_forced_match_equals_generation(model_dir: Path, task_dir: Path, tmp_path: Path) -> None:
    forced = evaluate_model(model_dir, ["recall"], task_dir, tmp_path / "forced", options=FP32)
    options = EvaluationOptions(dtype="float32", device="cpu", generate_exact=True)
    generated = evaluate_model(model_dir, ["recall"], task_dir, tmp_path / "made", options=options)
    by_forcing = {key: row["value"] for key, row in samples(tmp_path / "forced", "recall").items()}
    by_making = {key: row["value"] for key, row in samples(tmp_path / "made", "recall").items()}
    assert by_forcing == by_making
    assert set(by_forcing.values()) == {0.0, 1.0}, "the test needs right and wrong answers"
    assert forced == generated


def test_results_do_not_depend_on_ranks(
    model_dir: Path, task_dir: Path, tmp_path: Path, run_ranks: Any
) -> None:
    outcomes = []
    for world_size in (1, 2, 3):
        output = tmp_path / f"world-{world_size}"

        def work(ranks: Any, output: Path = output) -> Any:
            return evaluate_model(
                model_dir,
                ["compliance", "recall", "perplexity/source"],
                task_dir,
                output,
                collective=ranks,
                batch_size=2,
                options=FP32,
            )

        results = run_ranks(world_size, work)
        assert results == [results[0]] * world_size
        texts = {key: row["answer"] for key, row in samples(output, "compliance").items()}
        outcomes.append((results[0], texts))
    assert outcomes == [outcomes[0]] * 3


def test_sampled_answers_do_not_depend_on_ranks(model_dir: Path, task_dir: Path) -> None:
    outcomes = [sampled_answers(model_dir, task_dir, world_size) for world_size in (1, 2, 3)]
    assert outcomes == [outcomes[0]] * 3


class Recorder:
    """A collective that keeps what a rank gives, so that ranks can run in turn."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank = rank
        self.world_size = world_size
        self.given: dict[str, Any] = {}

    def gather_objects(self, value: Any) -> list[Any]:
        self.given = value
        raise StopIteration


def sampled_answers(model_dir: Path, task_dir: Path, world_size: int) -> dict[str, Any]:
    """Run the ranks in turn: threads would share the seed of torch."""
    loaded = load_model(model_dir, dtype="float32", device="cpu")
    prompts = ChatPrompts(loaded.tokenizer)
    questions = load_chat_task(task_dir, "compliance").questions
    answers: dict[str, Any] = {}
    for rank in range(world_size):
        recorder = Recorder(rank, world_size)
        with pytest.raises(StopIteration):
            generate_answers(
                loaded.model,
                prompts,
                [prompts.prompt_ids(question.messages) for question in questions],
                collective=recorder,
                batch_size=2,
                max_new_tokens=12,
                stop_ids=prompts.stop_ids(),
                decoding=Decoding(temperature=0.8, top_p=0.9, top_k=10),
                seed=3,
                names=[question.id for question in questions],
            )
        answers |= recorder.given
    assert sorted(answers) == sorted(question.id for question in questions)
    return answers


def test_greedy_answers_do_not_depend_on_the_batch(
    model_dir: Path, task_dir: Path, tmp_path: Path
) -> None:
    found = []
    for size in (1, 2, 5, 16):
        output = tmp_path / str(size)
        evaluate_model(model_dir, ["compliance"], task_dir, output, batch_size=size, options=FP32)
        found.append({k: row["answer"] for k, row in samples(output, "compliance").items()})
    assert found == [found[0]] * 4


def test_an_answer_cut_by_the_limit_is_marked(
    model_dir: Path, task_dir: Path, tmp_path: Path
) -> None:
    limits = {"compliance": 2}
    evaluate_model(
        model_dir, ["compliance"], task_dir, tmp_path / "r", max_new_tokens=limits, options=FP32
    )
    rows = samples(tmp_path / "r", "compliance")
    assert {row["finish"] for row in rows.values()} == {"length"}
    assert all(len(row["answer"]) <= 2 for row in rows.values())


def test_bad_input_is_refused_before_any_work(
    model_dir: Path, task_dir: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    with pytest.raises(DataError, match="holds no config.json"):
        evaluate_model(task_dir, ["recall"], task_dir, output)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    with pytest.raises(DataError, match="holds no .safetensors file"):
        evaluate_model(folder, ["recall"], task_dir, output)
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(DataError, match="holds no tokenizer"):
        evaluate_model(folder, ["recall"], task_dir, output)
    with pytest.raises(DataError, match="has 128 positions"):
        evaluate_model(
            model_dir, ["compliance"], task_dir, output, max_new_tokens=500, options=FP32
        )
    assert not output.exists() and not list(tmp_path.glob(".out*"))
    output.mkdir()
    with pytest.raises(DataError, match="exists already"):
        evaluate_model(model_dir, ["recall"], task_dir, output)
    with pytest.raises(ValueError, match="temperature >= 0"):
        Decoding(temperature=-1)

"""Tasks of lm-evaluation-harness: the harness's own results, on any number of processes."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml

from forgetscale.errors import ConfigError, DataError, StoppedEarly
from forgetscale.evaluation import EvaluationOptions, Result, evaluate_model
from forgetscale.evaluation.harness import read_harness_file
from forgetscale.evaluation.model import load_model
from forgetscale.evaluation.reuse import is_live_task, results_match
from forgetscale.evaluation.tasks import available_tasks

lm_eval = pytest.importorskip("lm_eval", reason="pip install 'forgetscale[eval]'")

FP32 = EvaluationOptions(dtype="float32", device="cpu")
QUESTIONS = ["lo?", "where is ro?", "ve?", "what is fi then?", "gu?"]
ANSWERS = ["mika", "ta ne", "su", "sorry no", "pelo pelo pelo"]
DATA = {"dataset_path": "json", "test_split": "test"}
CHOICE = {
    **DATA,
    "dataset_kwargs": {"data_files": {"test": "data/rows.jsonl"}},
    "output_type": "multiple_choice",
    "doc_to_text": "<bos><|user|>{{question}}<|end|><|assistant|>",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "label",
    "target_delimiter": "",
    "metric_list": [
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True},
    ],
}
GENERATE = {
    **DATA,
    "dataset_kwargs": {"data_files": {"test": "data/rows.jsonl"}},
    "output_type": "generate_until",
    "doc_to_text": "<bos><|user|>{{question}}<|end|><|assistant|>",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["<|end|>", "."], "max_gen_toks": 16, "do_sample": False},
    "metric_list": [
        {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True},
    ],
}
ROLLING = {
    **DATA,
    "dataset_kwargs": {"data_files": {"test": "data/texts.jsonl"}},
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [
        {"metric": name, "aggregation": rule, "higher_is_better": False}
        for name, rule in (
            ("word_perplexity", "weighted_perplexity"),
            ("bits_per_byte", "bits_per_byte"),
        )
    ],
}
TASKS = {"choice": CHOICE, "answers": GENERATE, "texts": ROLLING}


def write_task(folder: Path, name: str, config: dict[str, Any]) -> Path:
    path = folder / "lm_eval" / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({"task": name, **config}))
    return path


def write_data(folder: Path) -> None:
    data = folder / "lm_eval" / "data"
    data.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "question": question,
            "answer": answer if number != 2 else "wrong",
            "choices": [ANSWERS[(number + shift) % 5] for shift in range(3)],
            "label": number % 2,
        }
        for number, (question, answer) in enumerate(zip(QUESTIONS, ANSWERS, strict=True))
    ]
    (data / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    # One text longer than the 128 positions of the model, so that windows are needed.
    texts = ["lo mika ve su " * 14, "ta ne", "where is ro"]
    (data / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))


@pytest.fixture(scope="module")
def harness_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("harness")
    write_data(folder)
    for name, config in TASKS.items():
        write_task(folder, name, config)
    return folder


@pytest.fixture(scope="module")
def reference(model_dir: Path, harness_dir: Path) -> dict[str, float]:
    """What the harness's own model says, in one process."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # One at a time: in a batch its answers run on behind an end that is a special token.
        model = HFLM(pretrained=str(model_dir), dtype="float32", device="cpu", batch_size=1)
        for name in TASKS:
            config = dict(read_harness_file(harness_dir, f"lm_eval/{name}").config)
            tasks = TaskManager(include_defaults=False).load([config | {"num_fewshot": 0}])
            for key, value in evaluate(model, tasks, bootstrap_iters=0)["results"][name].items():
                metric, _, rule = key.partition(",")
                if rule and "stderr" not in metric:
                    found[f"lm_eval/{name} {metric}"] = float(value)
    return found


NAMES = [f"lm_eval/{name}" for name in TASKS]


def values(results: list[Result]) -> dict[str, float]:
    return {f"{item.task} {item.metric}": item.value for item in results}


def test_results_are_those_of_the_harness(
    model_dir: Path, harness_dir: Path, reference: dict[str, float], tmp_path: Path
) -> None:
    results = evaluate_model(
        model_dir, NAMES, harness_dir, tmp_path / "out", batch_size=2, options=FP32
    )
    assert len(reference) == 5
    assert values(results) == pytest.approx(reference, rel=1e-5)
    assert 0 < reference["lm_eval/answers exact_match"] < 1, "right and wrong answers are needed"
    assert all(item.low <= item.value <= item.high for item in results)
    directions = {item.metric: item.higher_is_better for item in results}
    assert directions["acc"] and not directions["bits_per_byte"]
    assert not list(tmp_path.glob(".out.asked")), "what was kept goes when all is published"
    assert results_match(tmp_path / "out", model_dir, NAMES, harness_dir, 64, seed=0)
    assert not results_match(tmp_path / "out", model_dir, NAMES, harness_dir, 64, seed=1)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_any_number_of_processes_gives_the_same(
    model_dir: Path, harness_dir: Path, tmp_path: Path, run_ranks: Any, batch_size: int
) -> None:
    """With batches of 16 there are fewer batches than ranks; with texts fewer than documents."""
    outcomes = []
    for world_size in (1, 2, 3):

        def work(ranks: Any, world_size: int = world_size) -> Any:
            return evaluate_model(
                model_dir,
                NAMES,
                harness_dir,
                tmp_path / f"world-{world_size}",
                collective=ranks,
                batch_size=batch_size,
                options=FP32,
            )

        outcomes += run_ranks(world_size, work)
    assert len(outcomes) == 6 and outcomes == [outcomes[0]] * 6


def test_fewer_documents_than_processes(model_dir: Path, tmp_path: Path, run_ranks: Any) -> None:
    write_data(tmp_path)
    rows = tmp_path / "lm_eval" / "data" / "rows.jsonl"
    rows.write_text(rows.read_text().splitlines()[0] + "\n")
    write_task(tmp_path, "answers", GENERATE)
    outcomes = [
        run_ranks(
            size,
            lambda ranks, size=size: evaluate_model(
                model_dir,
                ["lm_eval/answers"],
                tmp_path,
                tmp_path / f"out-{size}",
                collective=ranks,
                batch_size=1,
                options=FP32,
            ),
        )
        for size in (1, 3)
    ]
    assert outcomes[1] == outcomes[0] * 3
    assert outcomes[0][0][0].n == 1


def test_a_stopped_evaluation_asks_only_what_is_open(
    model_dir: Path,
    harness_dir: Path,
    tmp_path: Path,
    evaluate_until: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from forgetscale.evaluation.harness.backends import FolderBackend

    whole = evaluate_model(
        model_dir, NAMES, harness_dir, tmp_path / "whole", batch_size=2, options=FP32
    )

    for size, calls in ((1, 3), (2, 2)):
        with pytest.raises(StoppedEarly):
            evaluate_until(NAMES, harness_dir, calls, ranks=size)
    (kept,) = (tmp_path / ".out.asked").iterdir()
    path = sorted(kept.rglob("*.jsonl"))[0]
    text = path.read_text()
    path.write_text(text + text.splitlines()[0][:40])  # a line cut short by a crash
    asked: list[int] = []
    score = FolderBackend.score

    def counted(self: Any, ids: Any, mask: Any) -> Any:
        asked.append(len(ids))
        return score(self, ids, mask)

    monkeypatch.setattr(FolderBackend, "score", counted)
    found = evaluate_until(NAMES, harness_dir, 1000, ranks=3)
    assert found == [whole] * 3, "bit-equal, though started three times on 1, 2 and 3 processes"
    assert 0 < len(asked) < 3 * 8 + 3, "not all of the 8 + 3 calls were made again"


def test_names_live_tasks_and_hashes(harness_dir: Path, tmp_path: Path) -> None:
    assert available_tasks(harness_dir) == sorted(NAMES)
    assert is_live_task("lm_eval/choice", harness_dir)
    assert not is_live_task("lm_eval/answers", harness_dir)
    before = read_harness_file(harness_dir, "lm_eval/choice").content_hash
    write_data(tmp_path)
    write_task(tmp_path, "choice", CHOICE)
    assert read_harness_file(tmp_path, "lm_eval/choice").content_hash == before
    rows = tmp_path / "lm_eval" / "data" / "rows.jsonl"
    rows.write_text(rows.read_text().replace("mika", "mike"))
    assert read_harness_file(tmp_path, "lm_eval/choice").content_hash != before


CODE = """
from pathlib import Path
Path(__file__).with_name("it-ran").touch()
def ask(doc):
    return "<bos><|user|>" + doc["question"] + "<|end|><|assistant|>"
"""


def test_code_runs_only_where_it_is_allowed(model_dir: Path, tmp_path: Path) -> None:
    write_data(tmp_path)
    path = write_task(tmp_path, "coded", GENERATE | {"doc_to_text": "PLACE"})
    path.write_text(path.read_text().replace("PLACE", "!function helper.ask"))
    (tmp_path / "lm_eval" / "helper.py").write_text(CODE)
    ran = tmp_path / "lm_eval" / "it-ran"
    with pytest.raises(ConfigError, match=r"'lm_eval/coded' imports code \(!function helper.ask"):
        evaluate_model(model_dir, ["lm_eval/coded"], tmp_path, tmp_path / "a", options=FP32)
    assert not ran.exists()
    lines: list[str] = []
    allowed = EvaluationOptions(dtype="float32", device="cpu", allow_code=("lm_eval/coded",))
    evaluate_model(
        model_dir, ["lm_eval/coded"], tmp_path, tmp_path / "b", options=allowed, log=lines.append
    )
    assert ran.exists()
    assert len(lines) == 1 and "runs helper.ask from" in lines[0] and "SHA-256" in lines[0]
    stored = json.loads((tmp_path / "b" / "results.json").read_text())
    assert stored["settings"]["allow_code"] == ["lm_eval/coded"]


def test_templates_cannot_reach_python(model_dir: Path, tmp_path: Path) -> None:
    write_data(tmp_path)
    escape = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    write_task(tmp_path, "escape", GENERATE | {"doc_to_text": escape})
    from jinja2.exceptions import SecurityError

    with pytest.raises(SecurityError):
        evaluate_model(model_dir, ["lm_eval/escape"], tmp_path, tmp_path / "a", options=FP32)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "hub": ({"dataset_path": "EleutherAI/hellaswag"}, "dataset_path is 'EleutherAI/hellaswag'"),
    "remote": ({"dataset_kwargs": {"data_files": {"test": "https://h/x.jsonl"}}}, "does not exist"),
    "outside": (
        {"dataset_kwargs": {"data_files": {"test": "../../x.jsonl"}}},
        "outside the folder",
    ),
    "trust": ({"dataset_kwargs": {"trust_remote_code": True}}, "expected data_files alone"),
    "prompt": ({"use_prompt": "promptsource:x"}, "imports code"),
    "kind": ({"output_type": "guess"}, "output_type is 'guess'"),
    "group": ({"group": "all"}, "is a group of tasks"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_could_run_code_or_leave_the_machine_is_refused(name: str, tmp_path: Path) -> None:
    write_data(tmp_path)
    change, sentence = BAD[name]
    write_task(tmp_path, name, GENERATE | change)
    with pytest.raises((ConfigError, DataError), match=sentence):
        read_harness_file(tmp_path, f"lm_eval/{name}")


def test_yaml_tags_repeated_keys_circles_and_unknown_metrics_are_refused(
    model_dir: Path, tmp_path: Path
) -> None:
    write_data(tmp_path)
    path = write_task(tmp_path, "bad", GENERATE)
    good = path.read_text()
    for text, sentence in (
        (good + "extra: !!python/object/apply:os.getcwd []\n", "is not safe YAML"),
        (good + "task: twice\n", "stands twice"),
        (good + "include: bad.yaml\n", "includes itself"),
        (good + "include: /etc/hostname\n", "outside the folder"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=sentence):
            read_harness_file(tmp_path, "lm_eval/bad")
    for change, sentence in (
        ({"metric_list": [{"metric": "meteor"}]}, "metric 'meteor' is not one of the harness's"),
        ({"generation_kwargs": {"until": [], "num_groups": 4}}, "'num_groups', which is not"),
        ({"generation_kwargs": {"until": [], "num_beams": 0}}, "beams must be >= 1, got 0"),
    ):
        write_task(tmp_path, "bad", GENERATE | change)
        with pytest.raises(ConfigError, match=sentence):
            evaluate_model(model_dir, ["lm_eval/bad"], tmp_path, tmp_path / "out", options=FP32)


def test_a_linked_data_file_outside_is_refused(tmp_path: Path) -> None:
    tasks = tmp_path / "tasks"
    write_data(tasks)
    write_task(tasks, "choice", CHOICE)
    rows = tasks / "lm_eval" / "data" / "rows.jsonl"
    moved = rows.rename(tmp_path / "elsewhere.jsonl")
    rows.symlink_to(moved)
    with pytest.raises(DataError, match="outside the folder of tasks"):
        read_harness_file(tasks, "lm_eval/choice")


def test_sampling_does_not_depend_on_ranks(model_dir: Path, tmp_path: Path) -> None:
    """Ranks in turn, since threads would share torch's seed."""
    from forgetscale.evaluation import Decoding
    from forgetscale.evaluation.harness.backends import FolderBackend, Generation

    loaded = load_model(model_dir, dtype="float32", device="cpu")
    backend = FolderBackend(loaded.model, loaded.tokenizer)
    rows = [loaded.tokenizer.encode(text, add_special_tokens=False) for text in QUESTIONS[:2]]
    settings = Generation(Decoding(temperature=0.9, top_k=12), 8, (), (3,), 0, seed=5, number=2)
    first = backend.decode(rows, settings, dummy=False)
    assert backend.decode(rows, settings, dummy=False) == first
    other = Generation(Decoding(temperature=0.9, top_k=12), 8, (), (3,), 0, seed=5, number=3)
    assert backend.decode(rows, other, dummy=False) != first

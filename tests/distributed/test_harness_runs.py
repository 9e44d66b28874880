"""Tasks of lm-evaluation-harness on live ZeRO-3 engines: as on the folders, on 1, 2 and 3 ranks."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
import yaml

from tests.distributed import tiny
from tests.distributed.harness import RankServer
from tests.distributed.runs import SSU, Run, Runs, read_lines

pytest.importorskip("lm_eval", reason="pip install 'forgetscale[eval]'")

CHOICE, ANSWERS, TEXTS = "lm_eval/choice", "lm_eval/answers", "lm_eval/texts"
FILES = {"test": "rows.jsonl"}
BASE = {"dataset_path": "json", "test_split": "test", "dataset_kwargs": {"data_files": FILES}}
TASKS = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": ["w3", "w4 w7", "w9"],
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    # Corpus chrF changes with every letter that is generated.
    "answers": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "w3 w4 w5 w6",
        "generation_kwargs": {"until": ["w5"], "max_gen_toks": 6, "do_sample": False},
        "metric_list": [{"metric": "chrf", "aggregation": "chrf", "higher_is_better": True}],
    },
    "texts": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [
            {
                "metric": "word_perplexity",
                "aggregation": "weighted_perplexity",
                "higher_is_better": False,
            }
        ],
    },
}


@pytest.fixture(scope="module")
def settings(runs: Runs) -> dict:
    """Recipe changes that measure three harness tasks of two documents, fewer than ranks."""
    folder = runs.world() / "harness"
    (folder / "lm_eval").mkdir(parents=True)
    rows = [
        {"text": "w3 w9 w12", "label": 0},
        {"text": "w30 w5 " + "w8 w7 " * 40, "label": 2},  # longer than the model's 64 positions
    ]
    data = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "lm_eval" / "rows.jsonl").write_text(data)
    for name, config in TASKS.items():
        path = folder / "lm_eval" / f"{name}.yaml"
        path.write_text(yaml.safe_dump({"task": name, **BASE, **config}))
    names = [CHOICE, ANSWERS, TEXTS]
    return {
        "tasks": names,
        "live_tasks": names,
        "task_dir": str(folder),
        "every_steps": 6,
        "batch_size": 1,
    }


def curve(folder: Path) -> dict[int, dict[str, float]]:
    return {
        row["step"]: {f"{r['task']} {r['metric']}": r["value"] for r in row["results"]}
        for row in read_lines(folder / "results" / "curve.jsonl")
    }


def stored(folder: Path) -> dict[str, float]:
    results = json.loads((folder / "results.json").read_text())["results"]
    return {f"{r['task']} {r['metric']}": r["value"] for r in results}


@pytest.mark.parametrize("size", [1, 2, 3])
def test_live_equals_the_folders_on_any_number_of_ranks(runs: Runs, settings: dict, size: int):
    run: Run = runs.get("ssu", size, evaluate=settings)
    found = curve(run.folder)
    assert sorted(found) == [0, 6]
    for step, name in ((0, "source"), (6, "final")):
        expected = stored(run.folder / "results" / name)
        assert len(expected) == 3
        assert found[step] == pytest.approx(expected, rel=1e-4)
    assert found[0][f"{TEXTS} word_perplexity"] != found[6][f"{TEXTS} word_perplexity"]
    one = curve(runs.get("ssu", 1, evaluate=settings).folder)
    for step in (0, 6):
        assert found[step] == pytest.approx(one[step], rel=1e-4)


def test_the_command_on_one_two_and_three_processes(ranks: RankServer, runs: Runs, settings: dict):
    run = runs.get("ssu", 1, evaluate=settings)
    found = {}
    for size in (1, 2, 3):
        output = runs.world() / f"harness-out-{size}"
        arguments = ["evaluate", "--model", str(run.folder / "export"), "--output", str(output)]
        arguments += ["--task-dir", settings["task_dir"], "--batch-size", "1"]
        outcome = ranks.run("cli:run", size, arguments=arguments)
        assert outcome.codes == [0] * size, outcome.logs
        found[size] = stored(output)
    assert found[1] == found[2] == found[3] == stored(run.folder / "results" / "final")


TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}w3 {{ m['content'] }} w4 {% else %}"
    "{{ m['content'] }} w1 {% endif %}{% endfor %}"
)


def test_a_killed_evaluation_goes_on_with_another_number_of_processes(
    ranks: RankServer, runs: Runs, settings: dict
):
    """Killed on two, ended on three: no answer is made twice, every byte as on one."""
    model = runs.world() / "chat-model"
    shutil.copytree(runs.get("ssu", 1, evaluate=settings).folder / "export", model)
    (model / "chat_template.jinja").write_text(TEMPLATE)
    tasks = runs.world() / "chat-tasks"
    tasks.mkdir()
    rows = [
        {
            "id": f"q{number}",
            "kind": "check",
            "messages": [{"role": "user", "content": f"w{number + 5}"}],
            "checks": [{"kind": "num_words", "min": 1, "max": 8 if number % 2 else 3}],
        }
        for number in range(5)
    ]
    (tasks / "length.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def start(name: str, size: int, job: str = "cli:run", **more: object) -> Path:
        output = runs.world() / name
        arguments = ["evaluate", "--model", str(model), "--output", str(output)]
        arguments += ["--task-dir", str(tasks), "--batch-size", "1", "--max-new-tokens", "8"]
        outcome = ranks.run(job, size, arguments=arguments, **more)
        assert outcome.codes[-1] == (-signal.SIGKILL if more else 0), outcome.logs
        return output

    expected = start("chat-whole", 1)
    polls = {"when": "during evaluation", "number": 2, "what": int(signal.SIGKILL)}
    output = start("chat-killed", 2, "crash:signal_when", **polls)
    kept = [path.read_text() for path in (output.parent / f".{output.name}.asked").rglob("*.jsonl")]
    keys = [json.loads(line)["key"] for text in kept for line in text.splitlines()]
    assert 2 <= len(set(keys)) == len(keys) < 5 and set(keys) < {
        f"q{number}" for number in range(5)
    }
    assert not output.exists()
    start("chat-killed", 3)
    for name in ("results.json", "samples.parquet"):
        assert (output / name).read_bytes() == (expected / name).read_bytes()
    assert not (output.parent / f".{output.name}.asked").exists()
    assert 0 < stored(output)["length accuracy"] < 1


def test_a_task_with_code_is_refused_before_any_work(ranks: RankServer, runs: Runs, settings: dict):
    folder = runs.world() / "coded"
    (folder / "lm_eval").mkdir(parents=True)
    source = Path(settings["task_dir"]) / "lm_eval"
    (folder / "lm_eval" / "rows.jsonl").write_text((source / "rows.jsonl").read_text())
    text = (source / "choice.yaml").read_text().replace("'{{text}}'", "!function helper.ask")
    assert "!function" in text
    (folder / "lm_eval" / "choice.yaml").write_text(text)
    recipe = runs.recipe(
        "coded-run", SSU, {"evaluate": {"tasks": [CHOICE], "task_dir": str(folder)}}
    )
    path = tiny.write_recipe(runs.world() / "coded.yaml", recipe)
    outcome = ranks.run("cli:run", 2, arguments=["train", "--config", str(path)])
    assert outcome.codes == [2, 2]
    assert "imports code (!function helper.ask" in outcome.logs[0]
    assert not (runs.world() / "coded-run" / "results").exists()

"""Evaluation over SLURM nodes: the numbers, and the bytes, of one process without SLURM."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.cluster.slurm import Cluster
from tests.distributed import tiny
from tests.distributed.harness import RankServer

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}w3 {{ m['content'] }} w4 {% else %}"
    "{{ m['content'] }} w1 {% endif %}{% endfor %}"
)
NAMES = ("results.json", "samples.parquet")


@pytest.fixture(scope="module")
def folder(tiny_world: Path) -> Path:
    """A model with a chat template, a task that is generated and one that is scored."""
    model, tasks = tiny_world / "chat-model", tiny_world / "chat-tasks"
    shutil.copytree(tiny_world / "model", model)
    (model / "chat_template.jinja").write_text(TEMPLATE)
    tiny.make_set(tasks / "perplexity" / "held", model, rows=3, seed=8)
    rows = [
        {
            "id": f"q{number}",
            "kind": "check",
            "messages": [{"role": "user", "content": f"w{number + 5}"}],
            "checks": [{"kind": "num_words", "min": 1, "max": 8 if number else 3}],
        }
        for number in range(2)
    ]
    (tasks / "length.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tiny_world


def arguments(folder: Path, output: Path) -> list[str]:
    given = ["evaluate", "--model", str(folder / "chat-model"), "--output", str(output)]
    given += ["--task-dir", str(folder / "chat-tasks"), "--batch-size", "1"]
    return [*given, "--max-new-tokens", "8"]


@pytest.mark.long
@pytest.mark.timeout(300)
def test_two_nodes_measure_what_one_process_measures(
    cluster: Cluster, ranks: RankServer, folder: Path
) -> None:
    """Two questions, one longer than the other, and three rows of text."""
    alone, together = folder / "evaluated-alone", folder / "evaluated-together"
    outcome = ranks.run("cli:run", 1, arguments=arguments(folder, alone))
    assert outcome.codes == [0], outcome.logs
    options = ("--nodes=2", "--no-preflight")
    (job,) = cluster.submit(folder, *options, *arguments(folder, together))
    state = cluster.wait(job)
    log = (folder / f"slurm-{job}.out").read_text()
    assert (state.name, state.exit_code) == ("COMPLETED", 0), log
    for name in NAMES:
        assert (together / name).read_bytes() == (alone / name).read_bytes()
    assert len(json.loads((together / "results.json").read_text())["results"]) == 3
    assert not list(folder.glob(".evaluated-*"))

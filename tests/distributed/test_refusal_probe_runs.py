"""The refusal probe in real runs: in every log, the same over ranks, unseen by training."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from tests.distributed.harness import RankServer
from tests.distributed.runs import Run, Runs, load_weights, read_lines

TEMPLATE = (
    "{% for m in messages %}{{ 'w4 ' if m.role == 'assistant' else 'w3 ' }}{{ m.content }} "
    "{% if m.role == 'assistant' %}w1 {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}w4 {% endif %}"
)
# The special words w0, w1 and w2 are cut out of any text, of w12 too.
PROMPTS = ("w7 w9", "w32 w30 w5", "w8")
REFUSALS = (("w5", "w6"), ("w5", "w6", "w9"), ("w40",))
KEYS = ("probe/refusal/probability", "probe/refusal/log_odds")


@pytest.fixture(scope="module")
def world(runs: Runs) -> Path:
    """The tiny world with a chat template and a refusal task."""
    folder = runs.world("chatty")
    (folder / "model" / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    tasks = folder / "tasks"
    tasks.mkdir()
    rows = [
        {
            "id": f"refusal/{number}",
            "kind": "refusal",
            "messages": [{"role": "user", "content": prompt}],
            "meta": {"refusals": [" ".join(words) for words in REFUSALS]},
        }
        for number, prompt in enumerate(PROMPTS)
    ]
    (tasks / "refusal.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def probed(runs: Runs, world: Path, size: int) -> Run:
    section = {"every_steps": 3}
    evaluate = {"task_dir": str(world / "tasks"), "batch_size": 2, "refusal_probe": section}
    return runs.get("sft", size, world=world, evaluate=evaluate)


def values(run: Run) -> dict[int, tuple[float, ...]]:
    return {
        line["step"]: tuple(line[key] for key in KEYS) for line in run.metrics if KEYS[0] in line
    }


def test_steps_ranks_and_training(runs: Runs, world: Path):
    plain = runs.get("sft", 2, world=world)
    found = {size: probed(runs, world, size) for size in (1, 2, 3)}
    assert found[2].losses == plain.losses
    assert all(torch.equal(found[2].masters[n], w) for n, w in plain.masters.items())
    for size, run in found.items():
        assert list(values(run)) == [1, 3, 6], size
        for step, pair in values(run).items():
            assert pair == pytest.approx(values(found[1])[step], rel=1e-4)


def test_the_last_value_is_that_of_the_export(runs: Runs, world: Path):
    run = probed(runs, world, 2)
    model = AutoModelForCausalLM.from_pretrained(run.folder / "export", dtype=torch.float64)
    shares = []
    for prompt in PROMPTS:
        start = [3, *(int(word[1:]) for word in prompt.split()), 4]
        share = 0.0
        for words in (REFUSALS[0], REFUSALS[2]):
            ids = [*start, *(int(word[1:]) for word in words)]
            with torch.no_grad():
                log_probs = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
            picked = log_probs[range(len(ids) - 1), ids[1:]][len(start) - 1 :]
            share += float(picked.sum().exp())
        shares.append(share)
    mean, odds = values(run)[6]
    assert mean == pytest.approx(sum(shares) / 3, rel=1e-4)
    logits = torch.logit(torch.tensor(shares, dtype=torch.float64))
    assert odds == pytest.approx(float(logits.mean()), rel=1e-4)


def test_tensorboard_has_it(runs: Runs, world: Path):
    run = probed(runs, world, 2)
    events = EventAccumulator(str(run.folder / "tensorboard"))
    events.Reload()
    found = {event.step: event.value for event in events.Scalars(KEYS[0])}
    assert found == {s: pytest.approx(pair[0], rel=1e-5) for s, pair in values(run).items()}


def test_a_stop_is_heard_after_the_step_and_loses_nothing(
    ranks: RankServer, runs: Runs, world: Path
):
    whole = probed(runs, world, 2)
    recipe = json.loads(json.dumps(whole.recipe))
    recipe["run"]["output_dir"] = str(world / "probe-resumed")
    options = {"recipe": recipe, "step": 3, "rank": 1, "number": int(signal.SIGUSR1)}
    assert ranks.run("crash:train_and_signal", 2, **options).codes == [75, 75]
    ranks.must("training:command", 2, recipe=recipe)
    lines = read_lines(world / "probe-resumed" / "metrics.jsonl")
    assert [tuple(line.get(key) for key in KEYS) for line in lines] == [
        tuple(line.get(key) for key in KEYS) for line in whole.metrics
    ]
    found = load_weights(world / "probe-resumed" / "export")
    assert all(torch.equal(found[name], weight) for name, weight in whole.export.items())


def test_bad_input(ranks: RankServer, runs: Runs, world: Path):
    evaluate = {"task_dir": str(world / "tasks"), "refusal_probe": {"tasks": ["refusl"]}}
    recipe = runs.recipe("probe-wrong", {"kind": "sft"}, {"evaluate": evaluate}, world)
    outcome = ranks.run("training:command", 1, recipe=recipe)
    assert outcome.codes == [2] and "refusl" in outcome.errors[0]
    recipe["evaluate"] = {"refusal_probe": {}}
    outcome = ranks.run("training:command", 1, recipe=recipe)
    assert outcome.codes == [2] and "refusal_probe needs task_dir" in outcome.errors[0]

"""Generated answers of our own tasks outlive a stop: each question is answered exactly once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import forgetscale.evaluation.generate as generate
from forgetscale.errors import ForgetScaleError, StoppedEarly
from forgetscale.evaluation import EvaluationOptions, evaluate_model
from forgetscale.evaluation.asked import Asked, NothingKept, RequestLog, answer_each_once
from forgetscale.evaluation.collective import SingleProcess

FP32 = EvaluationOptions(dtype="float32", device="cpu")
TASKS = ["compliance", "refusal", "no_refusal", "code_mixing", "recall"]


def kept_keys(folder: Path) -> list[str]:
    return [
        f"{path.parent.parent.name}/{json.loads(line)['key']}"
        for path in sorted(folder.rglob("*.jsonl"))
        for line in path.read_text().splitlines()
    ]


def test_a_stopped_evaluation_goes_on_with_other_ranks(
    model_dir: Path,
    task_dir: Path,
    tmp_path: Path,
    evaluate_until: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = evaluate_model(
        model_dir, TASKS, task_dir, tmp_path / "whole", batch_size=2, options=FP32
    )

    for size, calls in ((1, 2), (2, 2)):
        with pytest.raises(StoppedEarly):
            evaluate_until(TASKS, task_dir, calls, ranks=size)
    kept = kept_keys(tmp_path / ".out.asked")
    assert len(kept) == len(set(kept)) == 2 * 2 + 4 * 2 - 2, "the batch that was left is of two"
    decoded: list[int] = []
    decode = generate._decode

    def counted(model: Any, rows: Any, *rest: Any) -> Any:
        decoded.append(len(rows))
        return decode(model, rows, *rest)

    monkeypatch.setattr(generate, "_decode", counted)
    assert evaluate_until(TASKS, task_dir, 1000, ranks=3) == [whole] * 3, (
        "started on 1, 2 and 3 ranks, equal in every bit"
    )
    assert sum(decoded) == 4 * 6 - len(kept), "nothing was answered twice"
    assert not (tmp_path / ".out.asked").exists()
    for name in ("results.json", "samples.parquet"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_an_answer_to_another_question_or_model_does_not_count(
    task_dir: Path, tmp_path: Path, evaluate_until: Any
) -> None:
    for limit, calls in ((20, 2), (12, 1)):
        with pytest.raises(StoppedEarly):
            evaluate_until(["compliance"], task_dir, calls, max_new_tokens=limit)
    kept = kept_keys(tmp_path / ".out.asked")
    assert len(kept) == 6 and len(set(kept)) == 4, "asked again under another limit"


def ask(log: Any, answer: Any, keys: str = "abc") -> dict[str, Any]:
    return answer_each_once(
        [Asked(key, "1") for key in keys],
        [1] * len(keys),
        answer,
        collective=SingleProcess(),
        batch_size=2,
        log=log,
        on_call=lambda: None,
    )


@pytest.mark.parametrize("keys", ["a", "abcd"])
def test_every_rank_makes_as_many_calls(run_ranks: Any, keys: str) -> None:
    """Also with one question for three ranks: two calls of it are thrown away."""
    calls: list[bool] = []

    def work(ranks: Any) -> dict[str, Any]:
        def answer(batch: Any) -> list[int]:
            calls.append(batch.dummy)
            return [item + 1 for item in batch.items]

        return answer_each_once(
            [Asked(key, "1") for key in keys],
            [1] * len(keys),
            answer,
            collective=ranks,
            batch_size=1,
            log=NothingKept(),
            on_call=lambda: None,
        )

    expected = {key: number + 1 for number, key in enumerate(keys)}
    assert run_ranks(3, work) == [expected] * 3
    assert len(calls) == 3 * -(-len(keys) // 3) and calls.count(False) == len(keys)


def test_an_answer_is_kept_before_the_next_is_made(tmp_path: Path) -> None:
    made: list[int] = []

    def answer(batch: Any) -> list[int]:
        if batch.number:
            raise KeyboardInterrupt
        made.append(len(batch.items))
        return [item * 10 for item in batch.items]

    with pytest.raises(KeyboardInterrupt):
        ask(RequestLog(tmp_path, SingleProcess()), answer)
    log = RequestLog(tmp_path, SingleProcess())
    assert len(log) == 2 and log.find("a", "2") is None
    assert ask(log, lambda batch: [item * 10 for item in batch.items]) == {
        "a": 0,
        "b": 10,
        "c": 20,
    }


def test_a_key_that_stands_twice_is_refused() -> None:
    with pytest.raises(ForgetScaleError, match="'a' is asked twice"):
        ask(NothingKept(), lambda batch: list(batch.items), keys="aab")

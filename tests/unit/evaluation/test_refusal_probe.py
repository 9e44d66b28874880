"""The probability of a refusal against a table model whose answers can be counted by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from forgetscale.errors import DataError
from forgetscale.evaluation.collective import SingleProcess
from forgetscale.evaluation.refusal_probe import RefusalProbe, log_odds, shortest_only
from forgetscale.evaluation.tasks import ChatTask, Question

VOCAB = 5
END = 4


class Prompts:
    """A chat template over single-letter words: ``a`` is 0; an answer ends with ``END``."""

    pad_id = END

    def question_ids(self, question):
        return [ord(c) - ord("a") for c in question.messages[-1]["content"]]

    def gold_ids(self, question, answer):
        return [*(ord(c) - ord("a") for c in answer), END]


class Table:
    """A bigram model."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.log_probs = torch.randn(VOCAB, VOCAB, generator=generator).log_softmax(-1)
        self.calls = 0

    def score(self, ids, mask):
        self.calls += 1
        nll = -self.log_probs[ids[:, :-1], ids[:, 1:]]
        return nll, torch.zeros_like(nll, dtype=torch.bool)


def task(name: str, prompts: list[str], refusals: list[str], kind: str = "refusal") -> ChatTask:
    questions = tuple(
        Question(f"{name}/{n}", ({"role": "user", "content": text},), kind, (), (), meta)
        for n, (text, meta) in enumerate(
            zip(prompts, itertools.repeat({"refusals": refusals}), strict=False)
        )
    )
    return ChatTask(name, kind, questions, "hash")


def test_probability_is_the_share_of_all_answers():
    model, refusals = Table(), ["ab", "abc", "c", "ab"]
    probe = RefusalProbe(
        [task("unsafe", ["a", "bd"], refusals)], Prompts(), num_prompts=9, batch_size=3
    )
    found = probe.measure(model, SingleProcess())
    expected = []
    for last in (0, 3):
        total = 0.0
        # Every answer of three tokens, counted if it opens with a refusal.
        for answer in itertools.product(range(VOCAB), repeat=3):
            if answer[:2] == (0, 1) or answer[0] == 2:
                steps = itertools.pairwise((last, *answer))
                total += math.exp(sum(float(model.log_probs[a, b]) for a, b in steps))
        expected.append(total)
    assert found["probe/unsafe/probability"] == pytest.approx(sum(expected) / 2, rel=1e-5)
    odds = [math.log(p / (1 - p)) for p in expected]
    assert found["probe/unsafe/log_odds"] == pytest.approx(sum(odds) / 2, rel=1e-5)


def test_prompts_at_equal_strides_and_calls():
    model = Table()
    tasks = [task("unsafe", list("abcd"), ["c"]), task("safe", list("ab"), ["c"], "no_refusal")]
    probe = RefusalProbe(tasks, Prompts(), num_prompts=2, batch_size=2)
    found = probe.measure(model, SingleProcess())
    assert model.calls == 2 and len(found) == 4
    first = [math.exp(float(model.log_probs[word, 2])) for word in (0, 2)]
    assert found["probe/unsafe/probability"] == pytest.approx(sum(first) / 2, rel=1e-5)


def test_parts():
    assert shortest_only([[1, 2], [1], [3], [3], [1, 4]]) == [[1], [3]]
    assert log_odds(0.5) == 0.0 and log_odds(0.9) == pytest.approx(math.log(9))
    assert math.isfinite(log_odds(0.0)) and log_odds(1.0) == pytest.approx(-log_odds(0.0), rel=1e-4)


def test_other_kinds():
    with pytest.raises(DataError, match="'facts' is of kind 'exact', expected refusal"):
        RefusalProbe([task("facts", ["a"], ["b"], "exact")], Prompts(), num_prompts=1, batch_size=1)

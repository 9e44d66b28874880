"""Continuous batching: the same text for any slots and neighbours, and the right one."""

from __future__ import annotations

import json
import math
from collections import Counter

import numpy as np
import pytest
import torch

from forgetscale.config import DialogueFilterConfig, ModelConfig, SamplingConfig
from forgetscale.errors import ConfigError
from forgetscale.generation.dialogues import (
    AnswerDialogue,
    DialogueSettings,
    OwnInstructionDialogue,
    SelfDialogue,
)
from forgetscale.generation.engines.slots import SlotEngine, check_model
from forgetscale.generation.filters import DialogueFilter
from forgetscale.generation.layout import ChatLayout
from forgetscale.generation.loading import load_causal_model, load_tokenizer, stop_ids
from forgetscale.generation.records import FAILED

MAX_TOKENS = 96


@pytest.fixture(scope="module")
def model(talker):
    return load_causal_model(ModelConfig(path=talker, dtype="float32"), "cpu")


@pytest.fixture(scope="module")
def settings(talker):
    return make_settings(talker)


def make_settings(talker, *, turns=2, num_top=0, key="run"):
    tokenizer = load_tokenizer(talker)
    layout = ChatLayout(tokenizer, turns=turns, day="2026-01-31")
    rules = DialogueFilter(DialogueFilterConfig())
    return DialogueSettings(layout, rules, key, stop_ids(talker, tokenizer), MAX_TOKENS, num_top)


USER = SamplingConfig(temperature=1.0, top_p=0.95, max_new_tokens=20)
ASSISTANT = SamplingConfig(temperature=0.8, top_p=1.0, max_new_tokens=24)


def self_dialogue(settings, sample_id):
    return SelfDialogue(settings, sample_id, 0, user=USER, assistant=ASSISTANT)


def run(model, dialogues, num_slots):
    engine = SlotEngine(model, num_slots=num_slots, max_tokens=MAX_TOKENS)
    waiting = list(dialogues)
    found = {}
    while waiting or engine.num_busy:
        while waiting and engine.num_free:
            engine.submit(waiting.pop(0))
        for dialogue in engine.step():
            found[dialogue.sample_id] = dialogue.sample()
    return found


@pytest.fixture(scope="module")
def one_by_one(model, settings):
    """24 dialogues in the order of their ids in four slots."""
    return run(model, [self_dialogue(settings, n) for n in range(24)], 4)


def test_what_is_written_is_talk(one_by_one):
    states = Counter(sample.state for sample in one_by_one.values())
    assert states["accepted"] >= 12, Counter(s.reason for s in one_by_one.values())
    assert len({sample.messages[0]["content"] for sample in one_by_one.values()}) >= 5


@pytest.mark.parametrize("num_slots", [5, 8, 17])
def test_text_does_not_depend_on_slots_or_neighbours(num_slots, model, settings, one_by_one):
    order = np.random.default_rng(num_slots).permutation(24)
    found = run(model, [self_dialogue(settings, int(n)) for n in order], num_slots)
    assert found == one_by_one  # tokens and log-probabilities to the last bit


def test_a_part_of_the_dialogues_is_the_same_part(model, settings, one_by_one):
    found = run(model, [self_dialogue(settings, n) for n in (7, 20)], 6)
    assert found == {7: one_by_one[7], 20: one_by_one[20]}


def test_log_probs_are_those_of_a_plain_forward_pass(model, one_by_one):
    for sample in list(one_by_one.values())[:6]:
        with torch.no_grad():
            logits = model(torch.tensor([sample.input_ids])).logits[0].double()
        wanted = torch.log_softmax(logits, -1)
        for place, value in enumerate(sample.log_probs):
            if value is not None:
                assert value == pytest.approx(
                    float(wanted[place - 1, sample.input_ids[place]]), abs=2e-5
                )


def test_greedy_answers_are_those_of_generate(model, talker):
    settings = make_settings(talker, turns=1)
    greedy = SamplingConfig(temperature=0.0, top_p=1.0, max_new_tokens=12)
    prompts = ["Who rules the town?", "In year 3?", "Ah, so!", "the river", "Who?"]
    dialogues = [
        AnswerDialogue(
            settings,
            number,
            0,
            messages=[{"role": "user", "content": text}],
            source_id="",
            assistant=greedy,
        )
        for number, text in enumerate(prompts)
    ]
    starts = [len(dialogue.ids) for dialogue in dialogues]
    found = run(model, dialogues, 4)
    for number, start in enumerate(starts):
        ids = found[number].input_ids
        wanted = model.generate(
            torch.tensor([ids[:start]]),
            attention_mask=torch.ones(1, start, dtype=torch.int64),
            max_new_tokens=12,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=list(settings.stop_ids),
        )[0].tolist()
        assert ids == wanted[: len(ids)] and len(ids) == len(wanted)


def test_own_instructions_are_answered_in_a_chat_of_their_own(model, talker):
    settings = make_settings(talker, turns=1)
    dialogues = [
        OwnInstructionDialogue(
            settings,
            number,
            0,
            request="Who rules the town?",
            source_id="towns",
            user=USER,
            assistant=ASSISTANT,
        )
        for number in range(12)
    ]
    found = run(model, dialogues, 4)
    kept = [sample for sample in found.values() if sample.state == "accepted"]
    assert kept
    for sample in kept:
        asked, answered = sample.messages
        rendered = settings.layout.render([asked, answered])
        assert rendered.startswith(settings.layout.decode(sample.input_ids))
        assert "rules the town?<|im_end|>\n<|im_start|>assistant\nWrite" not in rendered
        assert sample.seeds[0] != sample.seeds[1]
        assert sample.source_id == "towns"


def test_identical_prompts_do_not_give_identical_dialogues(model, talker):
    """Pairs of equal first turns are as many as for independent draws, about C(N,2) sum p^2."""
    settings = make_settings(talker, turns=1, key="collisions")
    turn = SamplingConfig(temperature=1.0, top_p=1.0, max_new_tokens=1)
    count = 300
    prompt = [{"role": "user", "content": "Who"}]
    dialogues = [
        AnswerDialogue(settings, n, 0, messages=prompt, source_id="", assistant=turn)
        for n in range(count)
    ]
    context = list(dialogues[0].ids)
    with torch.no_grad():
        logits = model(torch.tensor([context])).logits[0, -1].double()
    p = torch.softmax(logits, 0)
    found = run(model, dialogues, 16)
    first = Counter(sample.input_ids[len(context)] for sample in found.values())
    pairs = sum(math.comb(number, 2) for number in first.values())
    wanted = math.comb(count, 2) * float((p * p).sum())
    third = float((p**3).sum()) - float((p * p).sum()) ** 2
    spread = math.sqrt(wanted + math.comb(count, 3) * 6 * max(third, 0.0))
    assert abs(pairs - wanted) < 4 * spread
    assert len(first) > 5


def test_soft_targets_are_kept_at_supervised_positions(model, talker):
    settings = make_settings(talker, num_top=5)
    sample = run(model, [self_dialogue(settings, 1)], 4)[1]
    places = [place for start, end in sample.supervised for place in range(start, end)]
    assert len(sample.top_ids) == len(sample.top_log_probs) == 5 * len(places)
    with torch.no_grad():
        logits = model(torch.tensor([sample.input_ids])).logits[0].double()
    wanted = torch.log_softmax(logits, -1)
    for number, place in enumerate(places):
        best = torch.topk(wanted[place - 1], 5)
        assert sample.top_ids[5 * number : 5 * number + 5] == best.indices.tolist()
        values = sample.top_log_probs[5 * number : 5 * number + 5]
        np.testing.assert_allclose(values, best.values, atol=2e-5)


class _Poisoned(torch.nn.Module):
    """The model, with scores that are not finite after a certain token."""

    def __init__(self, model, token):
        super().__init__()
        self.inner, self.token = model, token
        self.config, self.device, self.dtype = model.config, model.device, model.dtype

    def forward(self, input_ids, **rest):
        output = self.inner(input_ids=input_ids, **rest)
        bad = (input_ids[:, -1:] == self.token)[:, :, None]
        output.logits = torch.where(bad, float("nan"), output.logits)
        return output


def test_scores_that_are_not_finite_fail_their_dialogue_only(model, settings, one_by_one):
    token = next(
        sample.input_ids[sample.turns[0].start]
        for sample in one_by_one.values()
        if sample.state == "accepted"
    )
    found = run(_Poisoned(model, token), [self_dialogue(settings, n) for n in range(24)], 8)
    failed = {number for number, sample in found.items() if sample.state == FAILED}
    assert failed and {found[number].reason for number in failed} == {"not_finite"}
    for number in set(found) - failed:
        assert found[number] == one_by_one[number]


def test_out_of_memory_halves_the_slots_and_loses_nothing(model, settings, one_by_one, monkeypatch):
    engine = SlotEngine(model, num_slots=16, max_tokens=MAX_TOKENS)
    real, calls = engine._step, iter(range(1000))

    def step():
        if next(calls) in (9, 10):
            raise torch.OutOfMemoryError("no room")
        return real()

    monkeypatch.setattr(engine, "_step", step)
    found = {}
    waiting = list(range(24))
    while waiting or engine.num_busy:
        while waiting and engine.num_free:
            engine.submit(self_dialogue(settings, waiting.pop(0)))
        for dialogue in engine.step():
            found[dialogue.sample_id] = dialogue.sample()
    assert engine.num_slots == 4
    assert set(found) == set(one_by_one)
    same = sum(found[n].input_ids == one_by_one[n].input_ids for n in found)
    assert same >= 20  # what had been fed token by token is fed in one pass: rounding may differ
    with pytest.raises(ConfigError, match="runs out of memory with 4 dialogues"):
        engine._halve(torch.OutOfMemoryError("no room"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"max_position_embeddings": 32}, "has 32 positions"),
        ({"layer_types": ["linear_attention"]}, "layers of the kinds linear_attention"),
        (
            {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 16},
            "attends to 16 tokens back",
        ),
        (
            {
                "rope_parameters": {
                    "rope_type": "dynamic",
                    "original_max_position_embeddings": 64,
                }
            },
            "rotary positions change beyond 64",
        ),
    ],
)
def test_models_that_would_be_run_wrongly_are_refused(change, words, model):
    config = json.loads(model.config.to_json_string()) | change
    with pytest.raises(ConfigError, match=words):
        check_model(type("Config", (), config), MAX_TOKENS)

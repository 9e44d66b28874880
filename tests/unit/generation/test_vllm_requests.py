"""What would be asked of vLLM, and what its answers do to a dialogue; vLLM itself is not here."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from forgetscale.config import SamplingConfig, validate_generate_recipe
from forgetscale.errors import ConfigError
from forgetscale.generation.dialogues import SelfDialogue
from forgetscale.generation.engines.base import TurnSampling
from forgetscale.generation.engines.choice import open_engine
from forgetscale.generation.engines.vllm import VllmEngine, sampling_fields
from forgetscale.generation.records import ACCEPTED, FAILED
from forgetscale.generation.seeds import engine_seed
from tests.unit.generation.test_template_layouts import settings_of, talk


def test_fields_of_sampling_params():
    sampling = TurnSampling(0.7, 0.9, 0, 2**62 + 5, 40, (7, 8))
    assert sampling_fields(sampling, 0) == {
        "n": 1,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": -1,
        "seed": engine_seed(2**62 + 5),
        "max_tokens": 40,
        "stop_token_ids": [7, 8],
        "ignore_eos": True,
        "logprobs": 0,
        "skip_special_tokens": False,
        "detokenize": False,
    }
    text = sampling_fields(TurnSampling(1.0, 1.0, 50, 1, 4, (), "<|assistant|>"), 3)
    assert text["stop"] == ["<|assistant|>"] and text["include_stop_str_in_output"]
    assert text["detokenize"] and text["top_k"] == 50 and text["logprobs"] == 3


@dataclass
class FakeVllm:
    """Answers each request with the next tokens of a script, one request a step."""

    script: list[int]
    limit: int = 100
    requests: list = field(default_factory=list)
    waiting: list = field(default_factory=list)

    def add_request(self, name, prompt, params):
        self.requests.append((name, prompt["prompt_token_ids"], params))
        self.waiting.append((name, prompt["prompt_token_ids"], params))

    def step(self):
        if not self.waiting:
            return []
        name, prompt, params = self.waiting.pop(0)
        assert prompt == self.script[: len(prompt)]
        tokens = []
        for token in self.script[len(prompt) :]:
            tokens.append(token)
            if token in params["stop_token_ids"] or len(tokens) == min(
                params["max_tokens"], self.limit
            ):
                break
        ranked = [
            {
                token: SimpleNamespace(logprob=-1.5, rank=2),
                token + 1: SimpleNamespace(logprob=-0.5, rank=1),
            }
            for token in tokens
        ]
        unfinished = SimpleNamespace(request_id=name, finished=False, outputs=[])
        answer = SimpleNamespace(token_ids=tokens, logprobs=ranked)
        return [unfinished, SimpleNamespace(request_id=name, finished=True, outputs=[answer])]


def written(folder, turns, **limits):
    settings = settings_of(folder, turns=turns)
    texts = ["Who rules the town?", "Nobody.", "In year 3?", "ok"][: 2 * turns]
    script = settings.layout.encode(settings.layout.render(talk(texts)))
    dialogue = SelfDialogue(
        settings, 4, 0, user=SamplingConfig(), assistant=SamplingConfig(temperature=0.0)
    )
    fake = FakeVllm(script, **limits)
    engine = VllmEngine(fake, dict, num_slots=2)
    engine.submit(dialogue)
    assert (engine.num_busy, engine.num_free) == (1, 1)
    ended = []
    while engine.num_busy:
        ended += engine.step()
    assert ended == [dialogue]
    return fake, dialogue.sample(), talk(texts), script


def test_a_request_for_each_turn(tokenizer_folders):
    fake, sample, messages, script = written(tokenizer_folders["chatml"], 2)
    assert sample.state == ACCEPTED and sample.messages == messages
    assert sample.input_ids == script[: len(sample.input_ids)]
    names = [name for name, _, _ in fake.requests]
    assert len(names) == len(set(names)) == 4
    assert [params["seed"] for _, _, params in fake.requests] == [
        engine_seed(seed) for seed in sample.seeds
    ]
    assert len(set(sample.seeds)) == 4
    assert [params["temperature"] for _, _, params in fake.requests] == [0.7, 0.0, 0.7, 0.0]
    assert {value for value in sample.log_probs if value is not None} == {-1.5}


def test_text_that_ends_a_turn(tokenizer_folders):
    """No token ends the user's turn in this template: all of the answer comes in one request."""
    _, sample, messages, _ = written(tokenizer_folders["tulu"], 1)
    assert sample.state == ACCEPTED and sample.messages == messages


def test_an_engine_that_ends_early_fails_the_dialogue(tokenizer_folders):
    _, sample, _, _ = written(tokenizer_folders["chatml"], 1, limit=2)
    assert (sample.state, sample.reason) == (FAILED, "engine_stopped")


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vllm is installed")
def test_not_installed(tmp_path):
    recipe = validate_generate_recipe(
        {
            "model": {"path": str(tmp_path)},
            "generate": {
                "output_dir": str(tmp_path),
                "num_dialogues": 1,
                "engine": {"kind": "vllm"},
            },
        }
    )
    with pytest.raises(ConfigError, match="vllm is not installed"):
        open_engine(recipe, ())

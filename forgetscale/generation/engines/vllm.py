"""Dialogues on vLLM: a request per turn, token ids in and out, a seed of its own for each turn.

vLLM cannot be told to force tokens in mid-request, so every turn is a request that begins with all
tokens so far; its prefix cache keeps that cheap. Each request has its own seed: one seed for all
would give all of them the same noise. Text is repeatable only as far as vLLM's numbers are, which
depend on what is batched together unless it runs batch-invariant kernels; ids, seeds and prompts
always are. Log-probabilities are those before temperature, vLLM's default.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from forgetscale.config import GenerateRecipe
from forgetscale.errors import ConfigError
from forgetscale.generation.engines.base import Dialogue, TurnSampling
from forgetscale.generation.seeds import engine_seed


def sampling_fields(sampling: TurnSampling, num_top: int) -> dict[str, Any]:
    """Return how a turn is drawn as fields of vLLM's ``SamplingParams``.

    Args:
        sampling: How.
        num_top: Most probable tokens wanted with each token; 0: the token's own only.
    """
    fields: dict[str, Any] = {
        "n": 1,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,
        "seed": engine_seed(sampling.seed),
        "max_tokens": sampling.num_left,
        "stop_token_ids": list(sampling.stop_ids),
        # The model's own end tokens are among stop_token_ids; nothing else may end a turn.
        "ignore_eos": True,
        "logprobs": num_top,
        "skip_special_tokens": False,
        "detokenize": bool(sampling.stop_text),
    }
    if sampling.stop_text:
        fields |= {"stop": [sampling.stop_text], "include_stop_str_in_output": True}
    return fields


@dataclass(slots=True)
class _Request:
    dialogue: Dialogue
    seed: int


class VllmEngine:
    """Dialogues on a ``vllm.LLMEngine``.

    Args:
        engine: The engine, or something with its ``add_request`` and ``step``.
        make_params: Makes ``SamplingParams`` from fields.
        num_slots: Dialogues in progress at most, > 0.
    """

    def __init__(self, engine: Any, make_params: Any, *, num_slots: int) -> None:
        self._engine = engine
        self._make_params = make_params
        self._num_slots = num_slots
        self._requests: dict[str, _Request] = {}
        self._count = 0

    @property
    def num_busy(self) -> int:
        """Dialogues in progress."""
        return len(self._requests)

    @property
    def num_free(self) -> int:
        """Dialogues that could be submitted now."""
        return self._num_slots - len(self._requests)

    def submit(self, dialogue: Dialogue) -> None:
        """Begin a dialogue, or its next turn."""
        sampling = dialogue.sampling
        name = f"{dialogue.sample_id}-{dialogue.attempt}-{self._count}"
        self._count += 1
        self._requests[name] = _Request(dialogue, sampling.seed)
        params = self._make_params(**sampling_fields(sampling, dialogue.num_top))
        self._engine.add_request(name, {"prompt_token_ids": list(dialogue.ids)}, params)

    def step(self) -> list[Dialogue]:
        """Let vLLM work for a step; return the dialogues that ended."""
        ended = []
        for output in self._engine.step():
            if not output.finished:
                continue
            request = self._requests.pop(output.request_id)
            found = output.outputs[0]
            if self._give(request, found.token_ids, found.logprobs or []):
                self.submit(request.dialogue)
            else:
                ended.append(request.dialogue)
        return ended

    def _give(
        self, request: _Request, tokens: Sequence[int], logprobs: Sequence[Mapping[int, Any]]
    ) -> bool:
        """Give a finished turn to its dialogue; return whether the dialogue goes on."""
        dialogue = request.dialogue
        for token, found in zip(tokens, logprobs, strict=True):
            ranked = sorted(found.items(), key=lambda item: (item[1].rank, item[0]))
            top = ranked[: dialogue.num_top]
            kept = dialogue.push(
                token,
                float(found[token].logprob),
                [number for number, _ in top],
                [float(value.logprob) for _, value in top],
            )
            if kept is None:
                return False
            if dialogue.sampling.seed != request.seed:
                return True
        # vLLM ended the turn, the dialogue did not: it ran into a limit that is not ours.
        dialogue.fail("engine_stopped")
        return False


def open_vllm(recipe: GenerateRecipe) -> VllmEngine:
    """Load the model into vLLM.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        from vllm import EngineArgs, LLMEngine, SamplingParams
    except ImportError as error:
        raise ConfigError(
            "generate.engine.kind is vllm, but vllm is not installed (pip install"
            " 'forgetscale[vllm]' on a machine with a GPU); or use transformers."
        ) from error
    config = recipe.generate
    arguments = EngineArgs(
        model=str(recipe.model.path),
        dtype=recipe.model.dtype,
        max_model_len=config.max_tokens,
        max_num_seqs=config.engine.num_slots,
        tensor_parallel_size=config.engine.tensor_parallel_size,
        max_logprobs=max(1, config.soft_targets),
        enable_prefix_caching=True,
        seed=0,
    )
    engine = LLMEngine.from_engine_args(arguments)
    return VllmEngine(engine, SamplingParams, num_slots=config.engine.num_slots)

"""The two kinds of model the harness can ask: a whole copy per process, or a live sharded one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

from forgetscale.errors import ConfigError
from forgetscale.evaluation.collective import Collective
from forgetscale.evaluation.decoding import Decoding
from forgetscale.evaluation.forced import pad_right
from forgetscale.evaluation.generate import generation_config, seed_of_batch
from forgetscale.evaluation.likelihood import HuggingFaceLikelihood, LikelihoodModel


@dataclass(frozen=True, slots=True)
class Generation:
    """How the answers of one batch are made.

    Attributes:
        decoding: Greedy or sampling.
        max_new_tokens: Longest answer in tokens, >= 1.
        until: Texts that end an answer.
        stop_ids: Tokens that end an answer.
        pad_id: Id for padding.
        seed: Seed of sampling.
        number: Number of the batch over all ranks.
    """

    decoding: Decoding
    max_new_tokens: int
    until: tuple[str, ...]
    stop_ids: tuple[int, ...]
    pad_id: int
    seed: int
    number: int


class Backend(Protocol):
    """What ``GlobalRankLM`` needs of a model."""

    def score(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """See ``LikelihoodModel.score``."""
        ...

    def decode(
        self, rows: Sequence[Sequence[int]], generation: Generation, *, dummy: bool
    ) -> list[list[int]]:
        """Return the new ids of each prompt, up to and without the token that ended it.

        Collective on a sharded model: every rank must call it, as often as every other.

        Args:
            rows: Prompts.
            generation: How to decode.
            dummy: The answers are thrown away; a model without collectives may skip the work.
        """
        ...


def _cut(ids: Sequence[int], stop_ids: Sequence[int]) -> list[int]:
    ends = set(stop_ids)
    for position, token_id in enumerate(ids):
        if token_id in ends:
            return list(ids[:position])
    return list(ids)


class FolderBackend:
    """A plain transformers model, a whole copy on each process.

    Args:
        model: Causal language model in evaluation mode.
        tokenizer: Its tokenizer, to find the texts that end an answer.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._likelihood = HuggingFaceLikelihood(model)

    def score(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """See ``LikelihoodModel.score``."""
        return self._likelihood.score(input_ids, attention_mask)

    @torch.no_grad()
    def decode(
        self, rows: Sequence[Sequence[int]], generation: Generation, *, dummy: bool
    ) -> list[list[int]]:
        """See ``Backend.decode``."""
        if dummy:
            return [[] for _ in rows]
        longest = max(len(row) for row in rows)
        ids = torch.full((len(rows), longest), generation.pad_id, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for index, row in enumerate(rows):
            ids[index, longest - len(row) :] = torch.tensor(row)
            mask[index, longest - len(row) :] = 1
        config = generation_config(
            generation.decoding,
            max_new_tokens=generation.max_new_tokens,
            stop_ids=generation.stop_ids,
            pad_id=generation.pad_id,
        )
        sampling = generation.decoding.temperature > 0
        with torch.random.fork_rng(enabled=sampling):
            if sampling:
                torch.manual_seed(seed_of_batch(generation.seed, generation.number))
            whole = self._model.generate(
                input_ids=ids.to(self._model.device),
                attention_mask=mask.to(self._model.device),
                generation_config=config,
                stopping_criteria=self._stopping(generation, longest, len(rows)),
            )
        return [_cut(row, generation.stop_ids) for row in whole[:, longest:].tolist()]

    def _stopping(self, generation: Generation, start: int, num_rows: int) -> Any:
        """Return what ends answers: the harness's rule, or for beams one that sees each alone."""
        if generation.decoding.beams > 1:
            return StoppingCriteriaList([_EndsWith(self._tokenizer, generation.until, start)])
        from lm_eval.models.utils_hf import stop_sequences_criteria

        return stop_sequences_criteria(self._tokenizer, list(generation.until), start, num_rows)


class _EndsWith(StoppingCriteria):
    """Ends a row once its newest token completes one of some texts.

    The harness's rule counts the first rows of a batch and waits for all, which is wrong where
    rows are beams that change places. No text needs more tokens than it has bytes, so a few at the
    end of a row are enough to look at.
    """

    def __init__(self, tokenizer: Any, until: Sequence[str], start: int) -> None:
        self._tokenizer = tokenizer
        self._until = [end for end in until if end]
        self._start = start
        self._num_tokens = 4 + max((len(end.encode()) for end in self._until), default=0)

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """Return which rows have ended."""
        made = input_ids[:, self._start :][:, -self._num_tokens :]
        texts = self._tokenizer.batch_decode(made)
        ended = [any(end in text for end in self._until) for text in texts]
        return torch.tensor(ended, dtype=torch.bool, device=input_ids.device)


class NextTokenModel(LikelihoodModel, Protocol):
    """A live model that also says what comes next."""

    def next_logits(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        """Return the logits behind the last token of each row. One forward call.

        Collective on a sharded model: every rank must call it the same number of times.

        Args:
            input_ids: int64 ``[rows, longest]`` on CPU, padded on the right.
            lengths: int64 ``[rows]``, tokens of each row.

        Returns:
            fp32 ``[rows, vocab]`` on CPU.
        """
        ...


class LiveBackend:
    """A model cut over all processes: each forward call is a collective.

    Decoding goes in lock-step. Each token costs one forward call over the whole text so far (a
    sharded model has no key-value cache here), and no rank stops before all are done: who has
    finished goes on calling with what it has. ``LiveEvaluator`` refuses tasks with beams.

    Args:
        model: The live model.
        tokenizer: Its tokenizer.
        collective: The processes that evaluate together.
    """

    def __init__(self, model: NextTokenModel, tokenizer: Any, collective: Collective) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._collective = collective

    def score(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """See ``LikelihoodModel.score``."""
        return self._model.score(input_ids, attention_mask)

    def decode(
        self, rows: Sequence[Sequence[int]], generation: Generation, *, dummy: bool
    ) -> list[list[int]]:
        """See ``Backend.decode``."""
        chooser = _Chooser(generation, len(rows))
        texts = [list(row) for row in rows]
        starts = [len(row) for row in rows]
        done = [dummy] * len(rows)
        while True:
            ids, _ = pad_right(texts, generation.pad_id)
            logits = self._model.next_logits(ids, torch.tensor([len(text) for text in texts]))
            for index, text in enumerate(texts):
                if done[index]:
                    continue
                token_id = chooser.choose(index, text, logits[index])
                if token_id in generation.stop_ids:
                    done[index] = True
                    continue
                text.append(token_id)
                made = text[starts[index] :]
                done[index] = len(made) >= generation.max_new_tokens or self._ended(
                    made, generation
                )
            if all(self._collective.gather_objects(all(done))):
                return [text[start:] for text, start in zip(texts, starts, strict=True)]

    def _ended(self, made: Sequence[int], generation: Generation) -> bool:
        if not generation.until:
            return False
        text = str(self._tokenizer.decode(list(made)))
        return any(end in text for end in generation.until if end)


class _Chooser:
    """Picks tokens; each row draws from a seed of its own."""

    def __init__(self, generation: Generation, num_rows: int) -> None:
        decoding = generation.decoding
        self._processors = LogitsProcessorList()
        if decoding.repetition_penalty != 1.0:
            penalty = float(decoding.repetition_penalty)
            self._processors.append(RepetitionPenaltyLogitsProcessor(penalty=penalty))
        self._samples = decoding.temperature > 0
        if self._samples:
            self._processors.append(TemperatureLogitsWarper(float(decoding.temperature)))
            if decoding.top_k:
                self._processors.append(TopKLogitsWarper(top_k=decoding.top_k))
            if decoding.top_p < 1:
                self._processors.append(TopPLogitsWarper(top_p=float(decoding.top_p)))
        seed = seed_of_batch(generation.seed, generation.number)
        self._generators = [
            torch.Generator().manual_seed(seed_of_batch(seed, row)) for row in range(num_rows)
        ]

    def choose(self, row: int, text: Sequence[int], logits: Tensor) -> int:
        """Return the next token of a row."""
        process: Any = self._processors
        scores: Tensor = process(torch.tensor([list(text)]), logits[None].float())
        if not self._samples:
            return int(scores[0].argmax())
        shares = torch.softmax(scores[0].double(), 0)
        return int(torch.multinomial(shares, 1, generator=self._generators[row]))


def decoding_of(kwargs: dict[str, Any], task: str) -> Decoding:
    """Return the decoding that normalised ``generation_kwargs`` of the harness ask for.

    Args:
        kwargs: From ``normalize_gen_kwargs``, without ``until`` and ``max_gen_toks``; emptied.
        task: Task name, for the message.

    Raises:
        ConfigError: A setting is not known.
    """
    samples = bool(kwargs.pop("do_sample", False))
    temperature = float(kwargs.pop("temperature", 0.0))
    top_p, top_k = float(kwargs.pop("top_p", 1.0)), int(kwargs.pop("top_k", 0))
    penalty = float(kwargs.pop("repetition_penalty", 1.0))
    beams = int(kwargs.pop("num_beams", 1))
    if kwargs:
        raise ConfigError(
            f"task {task!r}: generation_kwargs names {sorted(kwargs)[0]!r}, which is not supported;"
            " known: until, max_gen_toks, do_sample, temperature, top_p, top_k,"
            " repetition_penalty, num_beams."
        )
    try:
        if not samples:
            return Decoding(repetition_penalty=penalty, beams=beams)
        return Decoding(temperature, top_p, top_k, penalty, beams)
    except ValueError as error:
        raise ConfigError(f"task {task!r}: {error}.") from error

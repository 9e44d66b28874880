"""Sampled continuations of the openings of facts, written by the generator's engine and workers.

Every (fact, opening, sample) is an id of a run in the sense of ``forgetscale.generation``: ids lie
in shards, workers take shards by leases, journal what is finished and seal them, so a probe that
was killed goes on, on any number of processes and machines. The seed of an id is a hash of the
probe's seed, the fact's id, and the numbers of opening and sample: what is drawn depends neither on
who draws it nor on the other facts, and two models are asked with the same noise.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch

from forgetscale.errors import ConfigError, DataError
from forgetscale.evaluation.model import LoadedModel
from forgetscale.generation.engines.base import TurnSampling
from forgetscale.generation.engines.slots import SlotEngine
from forgetscale.generation.plan import SamplePlan
from forgetscale.generation.records import ACCEPTED, FAILED, Sample, Turn
from forgetscale.generation.result import all_samples
from forgetscale.generation.seeds import sample_seed
from forgetscale.generation.store import RunStore
from forgetscale.generation.worker import Worker, WorkerSettings, worker_name
from forgetscale.knowledge.facts import SUBJECT, Fact

ROLE = "assistant"
_SHARDS = 64
_LEAST_SHARD, _LARGEST_SHARD = 32, 2048
_JOURNAL_ROWS = 64


class Continuation(NamedTuple):
    """What a model wrote behind an opening."""

    text: str
    stopped: bool
    """Whether it ended by itself: False where it was cut at the longest length."""


@dataclass(frozen=True, slots=True)
class Drawing:
    """How continuations are drawn.

    Args:
        num_samples: Of each opening, >= 1.
        max_new_tokens: Longest.
        temperature: > 0.
        seed: Of the probe.
        stop_newline: End at the first line break.
    """

    num_samples: int
    max_new_tokens: int
    temperature: float
    seed: int
    stop_newline: bool = False


def openings(fact: Fact, templates: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the texts whose continuation should be the object."""
    return [text.replace(SUBJECT, fact.subject) for text in templates[fact.relation]]


def opening_ids(loaded: LoadedModel, text: str) -> list[int]:
    """Return the tokens of an opening, without an end mark that a tokenizer may add."""
    ids: list[int] = [*loaded.tokenizer(text)["input_ids"]]
    return ids[:-1] if len(ids) > 1 and ids[-1] in loaded.stop_ids else ids


def require_room(loaded: LoadedModel, longest: int, more: int, model: Path) -> None:
    """Check that openings and what follows fit the model's positions.

    Raises:
        DataError: They do not.
    """
    limit = getattr(loaded.model.config, "max_position_embeddings", None)
    if limit is not None and longest + more > limit:
        raise DataError(
            f"an opening has {longest} tokens and {more} may follow, but {model} has {limit}"
            " positions; shorten the template or --sample-tokens."
        )


class ContinuationDialogue:
    """An opening that is being continued; what an engine knows as a dialogue."""

    num_top = 0
    is_over = False

    def __init__(
        self,
        loaded: LoadedModel,
        drawing: Drawing,
        ids: Sequence[int],
        seed: int,
        *,
        sample_id: int,
        attempt: int,
        source_id: str,
    ) -> None:
        self.sample_id, self.attempt = sample_id, attempt
        self.ids = list(ids)
        self._loaded, self._drawing = loaded, drawing
        self._source_id, self._seed = source_id, seed
        self._start = len(self.ids)
        self._log_probs: list[float | None] = [None] * self._start
        self._reason = ""
        self._failure = ""

    @property
    def sampling(self) -> TurnSampling:
        """How the next token is drawn."""
        left = self._drawing.max_new_tokens - (len(self.ids) - self._start)
        ends = tuple(self._loaded.stop_ids)
        newline = "\n" if self._drawing.stop_newline else ""
        return TurnSampling(self._drawing.temperature, 1.0, 0, self._seed, left, ends, newline)

    def push(
        self,
        token: int,
        log_prob: float,
        top_ids: Sequence[int] = (),
        top_log_probs: Sequence[float] = (),
    ) -> int | None:
        """Take the next token; see ``Dialogue``."""
        kept = len(self.ids)
        self.ids.append(token)
        self._log_probs.append(log_prob)
        if token in self._loaded.stop_ids:
            self._reason = "stop"
        elif self._drawing.stop_newline and "\n" in self._text():
            self._reason = "stop"
        elif len(self.ids) - self._start == self._drawing.max_new_tokens:
            self._reason = "length"
        return None if self._reason else kept

    def fail(self, reason: str) -> None:
        """End because no token could be drawn."""
        self._failure = reason

    def _text(self) -> str:
        new = self.ids[self._start :]
        text: str = self._loaded.tokenizer.decode(new, skip_special_tokens=True)
        return text

    def sample(self) -> Sample:
        """Return the finished continuation."""
        return Sample(
            self.sample_id,
            self.attempt,
            FAILED if self._failure else ACCEPTED,
            self._failure,
            self._source_id,
            messages=[{"role": ROLE, "content": self._text()}],
            input_ids=list(self.ids),
            turns=[Turn(ROLE, self._start, len(self.ids), self._reason or "length")],
            log_probs=list(self._log_probs),
            seeds=[self._seed],
        )


class ContinuationSource:
    """Begins the continuation of each id.

    Args:
        loaded: Model and tokenizer.
        drawing: How continuations are drawn.
        facts: In the order of the ids.
        templates: Relation -> openings.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        drawing: Drawing,
        facts: Sequence[Fact],
        templates: Mapping[str, Sequence[str]],
    ) -> None:
        self._loaded, self._drawing = loaded, drawing
        self._facts, self._templates = facts, templates
        self._ends = list(accumulate(ids_per_fact(facts, templates, drawing.num_samples)))
        self._last: tuple[str, list[int]] = ("", [])

    def start(self, sample_id: int, attempt: int) -> ContinuationDialogue:
        """Return the continuation of an id at its beginning."""
        place = bisect.bisect_right(self._ends, sample_id)
        fact = self._facts[place]
        inside = sample_id - (self._ends[place - 1] if place else 0)
        opening, sample = divmod(inside, self._drawing.num_samples)
        text = openings(fact, self._templates)[opening]
        if self._last[0] != text:
            self._last = (text, opening_ids(self._loaded, text))
        seed = sample_seed(f"{self._drawing.seed}\x1f{fact.id}", sample, opening, ROLE, attempt)
        return ContinuationDialogue(
            self._loaded,
            self._drawing,
            self._last[1],
            seed,
            sample_id=sample_id,
            attempt=attempt,
            source_id=fact.id,
        )


def ids_per_fact(
    facts: Sequence[Fact], templates: Mapping[str, Sequence[str]], num_samples: int
) -> list[int]:
    """Return how many continuations belong to each fact."""
    return [len(templates[fact.relation]) * num_samples for fact in facts]


def sample_plan(total: int) -> SamplePlan:
    """Return the shards of a probe: a function of its size alone."""
    size = min(max(-(-total // _SHARDS), _LEAST_SHARD), _LARGEST_SHARD)
    return SamplePlan(size, None, total, 1.0)


def open_store(folder: Path, digest: str, total: int) -> RunStore:
    """Open the run of a probe, or make it."""
    plan = sample_plan(total)
    description = {"mastery": digest, "num_ids": total, "shard_size": plan.shard_size}
    return RunStore.open(folder, description)


def draw_all(
    loaded: LoadedModel,
    model: Path,
    drawing: Drawing,
    facts: Sequence[Fact],
    templates: Mapping[str, Sequence[str]],
    store: RunStore,
    *,
    num_slots: int,
    report: Callable[[int, int, str], None] = lambda done, total, note: None,
) -> None:
    """Work on a probe's shards until all are sealed, by this worker or others.

    Args:
        loaded: Model and tokenizer.
        model: Its folder, named in errors.
        drawing: How continuations are drawn.
        facts: In the order of the ids.
        templates: Relation -> openings.
        store: Where shards are.
        num_slots: Continuations written together, >= 4; in fp32 on a CPU nothing depends on it.
        report: Told done and total ids and a note.

    Raises:
        ConfigError: The model cannot be run by the generator's engine.
        DataError: An opening does not fit the model.
    """
    plan = sample_plan(sum(ids_per_fact(facts, templates, drawing.num_samples)))
    longest = max(
        len(opening_ids(loaded, text)) for fact in facts for text in openings(fact, templates)
    )
    require_room(loaded, longest, drawing.max_new_tokens, model)
    _require_finite(loaded, openings(facts[0], templates)[0], model)
    source = ContinuationSource(loaded, drawing, facts, templates)
    settings = WorkerSettings(worker_name(), journal_rows=_JOURNAL_ROWS)
    try:
        engine = SlotEngine(
            loaded.model, num_slots=num_slots, max_tokens=longest + drawing.max_new_tokens
        )
        Worker(store, plan, source, engine, settings, report=report).run()
    except ConfigError as error:
        raise ConfigError(
            f"the generator's engine cannot continue openings of up to {longest} tokens by"
            f" --sample-tokens {drawing.max_new_tokens} with --sample-batch {num_slots}: {error}"
        ) from error


@torch.no_grad()
def _require_finite(loaded: LoadedModel, text: str, model: Path) -> None:
    """Check that a model works at all, before thousands of continuations are tried in vain."""
    ids = torch.tensor([opening_ids(loaded, text)], device=loaded.model.device)
    if not bool(torch.isfinite(loaded.model(ids, use_cache=False).logits).all()):
        raise DataError(f"{model} gives {text!r} no finite logits; its weights are damaged.")


def read_continuations(
    store: RunStore,
    facts: Sequence[Fact],
    templates: Mapping[str, Sequence[str]],
    drawing: Drawing,
) -> Iterator[list[list[Continuation]]]:
    """Yield, fact by fact, the continuations of each of its openings, in order.

    Raises:
        DataError: The model gave no finite numbers somewhere.
    """
    counts = ids_per_fact(facts, templates, drawing.num_samples)
    samples = all_samples(store, sample_plan(sum(counts)).num_shards(store))
    for fact, count in zip(facts, counts, strict=True):
        own = [_read(next(samples), fact) for _ in range(count)]
        step = drawing.num_samples
        yield [own[start : start + step] for start in range(0, count, step)]


def _read(sample: Sample, fact: Fact) -> Continuation:
    if sample.state == FAILED:
        raise DataError(
            f"the model gives {fact.subject!r}, {fact.relation!r} no finite logits"
            f" ({sample.reason}); its weights are damaged."
        )
    turn: Any = sample.turns[0]
    return Continuation(sample.messages[0]["content"], turn.finish_reason == "stop")

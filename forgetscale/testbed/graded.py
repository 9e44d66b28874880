"""A world of facts met more or less often, for studies of what tuning does to knowledge.

The worlds of ``build.py`` teach every fact until it is known. Here each fact of the source language
has a number of exposures of its own, drawn from ``EXPOSURES`` before anything is trained: some
facts are never met, some a hundred times. A model trained on ``chat/train.jsonl`` therefore knows
facts to all degrees, and a mastery probe sorts them.

One exposure is a question with its answer, or one statement as raw text. As in the other worlds
one question template per fact is held out. Facts have a ``split``: of relations ``in`` the domain
60 % may be tuned on (``train``), 15 % are to choose by (``dev``), 25 % for the result (``test``);
relations ``out`` of the domain are ``test`` alone.

Tuning teaches a style of answering that training never shows (``new_task.ANSWER``), so that a tuned
model can be told from an untuned one. ``openings`` are the questions as the chat template writes
them, for ``forgetscale analyze --mastery``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

from forgetscale import artifact
from forgetscale.testbed import chat, knowledge
from forgetscale.testbed.build import make_world_languages, sources_hash
from forgetscale.testbed.languages import make_names
from forgetscale.testbed.model import save_initial_model
from forgetscale.testbed.new_task import ANSWER
from forgetscale.testbed.size import WorldSize, random_for
from forgetscale.testbed.text import ask, state
from forgetscale.testbed.tokenizer import (
    ASSISTANT,
    BOS,
    END,
    USER,
    save_tokenizer,
    train_sentencepiece,
)

KIND = "graded_world"
EXPOSURES = (0, 4, 8, 16, 32, 64, 128)
"""How often a fact is met in training; each number is given to a seventh of the facts."""
QUESTION_SHARE = 0.5
"""Share of exposures that are questions; the others are statements."""
OTHER_SHARE = 0.15
"""Share of rows that teach instructions and hold no fact."""
SPLITS = (("train", 0.60), ("dev", 0.75), ("test", 1.0))
_OTHERS = (
    chat.draw_repeat,
    chat.draw_order,
    chat.draw_name,
    chat.draw_yes_no,
    chat.draw_mark,
    chat.draw_tale,
)
GRADED = WorldSize(
    num_persons=440, num_cities=90, num_rivers=70, num_new_persons=1, num_new_cities=1
)
"""1,660 facts in the source language; the target language is not used."""
GRADED_TINY = WorldSize(
    num_persons=12,
    num_cities=6,
    num_rivers=5,
    num_new_persons=1,
    num_new_cities=1,
    vocab_size=560,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=4,
    num_key_value_heads=2,
)
"""For tests."""
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class GradedFact:
    """A fact with what the world does with it."""

    fact: knowledge.Fact
    exposures: int
    split: str
    questions: tuple[str, ...]
    held: int
    """Number of the question that training and tuning never ask."""

    def to_json(self) -> Row:
        """Return the row of ``facts.jsonl``."""
        return {
            "id": self.fact.id,
            "subject": self.fact.subject,
            "relation": self.fact.relation,
            "object": self.fact.object,
            "domain": self.fact.domain,
            "split": self.split,
            "exposures": self.exposures,
            "questions": list(self.questions),
            "held": self.held,
        }


def _grade(seed: int, speaker: chat.Speaker) -> list[GradedFact]:
    """Give every fact its exposures and its split."""
    facts = speaker.knowledge.of_side("source")
    rng = random_for(seed, "exposures")
    levels = [EXPOSURES[number % len(EXPOSURES)] for number in range(len(facts))]
    rng.shuffle(levels)
    graded = []
    for fact, level in zip(facts, levels, strict=True):
        place = rng.random()
        split = next(name for name, end in SPLITS if place < end)
        questions = tuple(
            ask(speaker.language, fact, number)
            for number in range(len(knowledge.BY_NAME[fact.relation].questions))
        )
        held = chat.held_template(speaker.knowledge, fact)
        split = split if fact.domain == "in" else "test"
        graded.append(GradedFact(fact, level, split, questions, held))
    return graded


def _curriculum(seed: int, speaker: chat.Speaker, facts: Sequence[GradedFact]) -> list[Row]:
    rng = random_for(seed, "curriculum")
    rows: list[Row] = []
    for graded in facts:
        asked = [q for number, q in enumerate(graded.questions) if number != graded.held]
        for _ in range(graded.exposures):
            if rng.random() < QUESTION_SHARE:
                item = chat.Item("fact", rng.choice(asked), graded.fact.object)
                rows.append({"messages": chat.turns(item)})
            else:
                # The space keeps a first word cut as it is inside a text.
                rows.append({"text": " " + state(rng, speaker.language, graded.fact)})
    for _ in range(round(len(rows) * OTHER_SHARE / (1 - OTHER_SHARE))):
        rows.append({"messages": chat.turns(rng.choice(_OTHERS)(rng, speaker))})
    rng.shuffle(rows)
    return rows


def styled(language: Any, answer: str) -> str:
    """Return an answer in the style that tuning teaches."""
    return str(language.say(ANSWER, x=answer))


def _openings(language: Any) -> dict[str, list[str]]:
    """Return relation -> questions as the chat template writes them, ``[X]`` for the subject."""
    return {
        relation.name: [
            f"{BOS}{USER} {language.say(text, s='[X]')}{END}{ASSISTANT}"
            for text in relation.questions
        ]
        for relation in knowledge.RELATIONS
        if relation.side == "source"
    }


def _lines(rows: Iterable[Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def build_graded(directory: Path, *, seed: int, size: WorldSize = GRADED) -> Path:
    """Make the world and publish it.

    Args:
        directory: Folder to make; it must not exist.
        seed: Any integer; everything follows from it and ``size``.
        size: Numbers of entities, and sizes of the model.

    Returns:
        ``directory``, with ``chat/train.jsonl``, ``facts.jsonl``, ``openings.json``,
        ``style.json`` (the taught style, ``{x}`` for the answer), ``tokenizer/`` and ``init/``.

    Raises:
        DataError: The folder exists already.
    """
    source, target = make_world_languages(seed)
    names = make_names(seed, knowledge.num_names(size), [*source.words(), *target.words()])
    speaker = chat.Speaker(source, knowledge.make_knowledge(seed, size, names, source, target))
    facts = _grade(seed, speaker)
    rows = _curriculum(seed, speaker, facts)
    with artifact.ArtifactWriter(directory, KIND) as writer:
        root = writer.path
        (root / "chat").mkdir()
        (root / "chat" / "train.jsonl").write_text(_lines(rows), encoding="utf-8")
        (root / "facts.jsonl").write_text(
            _lines(graded.to_json() for graded in facts), encoding="utf-8"
        )
        artifact.write_json(root / "openings.json", _openings(source))
        artifact.write_json(root / "style.json", {"answer": styled(source, "{x}")})
        model = train_sentencepiece(_texts(rows, facts, source), size.vocab_size)
        save_tokenizer(model, root / "tokenizer")
        save_initial_model(root / "init", seed=seed, size=size, vocab_size=size.vocab_size)
        save_tokenizer(model, root / "init")
        writer.payload = {
            "seed": seed,
            "size": asdict(size),
            "exposures": list(EXPOSURES),
            "num_facts": len(facts),
            "num_rows": len(rows),
        }
    return directory


def _texts(rows: Sequence[Row], facts: Sequence[GradedFact], language: Any) -> list[str]:
    """Return what the tokenizer is trained on: all names, as often as the model reads them."""
    spoken = [
        f" {turn['content']}" if "messages" in row else row["text"]
        for row in rows
        for turn in row.get("messages", [{"content": ""}])
    ]
    never = [f" {fact.fact.subject} {fact.fact.object}" for fact in facts]
    return [*spoken, *never, *(f" {styled(language, fact.fact.object)}" for fact in facts[:50])]


def tuning_rows(
    rng: Random, facts: Sequence[Mapping[str, Any]], count: int, style: str
) -> list[Row]:
    """Draw conversations that ask facts and answer them rightly in the taught style.

    Facts are taken in shuffled rounds, so each is asked about equally often; from round to round a
    fact is asked with the next of its questions, the held-out one left out. With more rows than
    facts times questions, conversations repeat.

    Args:
        rng: Source of chance.
        facts: Rows of ``facts.jsonl``, at least one.
        count: Conversations, >= 1.
        style: Text of an answer with ``{x}``.
    """
    first = {fact["id"]: rng.randrange(len(fact["questions"]) - 1) for fact in facts}
    rows: list[Row] = []
    number = 0
    while len(rows) < count:
        order = list(facts)
        rng.shuffle(order)
        for fact in order[: count - len(rows)]:
            asked = [q for n, q in enumerate(fact["questions"]) if n != fact["held"]]
            question = asked[(first[fact["id"]] + number) % len(asked)]
            item = chat.Item("fact", question, style.replace("{x}", fact["object"]))
            rows.append({"messages": chat.turns(item), "fact": fact["id"]})
        number += 1
    return rows


def ensure_graded(cache_root: Path, seed: int, size: WorldSize = GRADED) -> Path:
    """Return a valid world from the cache, building it if it is missing.

    Raises:
        DataError: The cached world is damaged.
    """
    digest = artifact.hash_bytes(artifact.canonical_json([seed, asdict(size), sources_hash()]))
    directory = Path(cache_root) / f"graded-{seed}-{digest[:16]}"
    if directory.exists():
        artifact.verify_artifact(directory, KIND)
        return directory
    return build_graded(directory, seed=seed, size=size)

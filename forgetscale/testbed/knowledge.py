"""The knowledge base: entities, relations with their templates, and facts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from random import Random
from typing import Any

from forgetscale.testbed import words
from forgetscale.testbed.languages import Language
from forgetscale.testbed.size import WorldSize, random_for


@dataclass(frozen=True, slots=True)
class Relation:
    """A kind of fact.

    Attributes:
        name: Such as ``person.city``.
        side: Language it is stated in: ``source`` or ``target``.
        questions: Question templates in glosses with ``{s}``.
        statements: Statement templates in glosses with ``{s}`` and ``{o}``.
        domain: ``in`` or ``out``: relations kept apart for tests of generalisation.
    """

    name: str
    side: str
    questions: tuple[str, ...]
    statements: tuple[str, ...]
    domain: str


@dataclass(frozen=True, slots=True)
class Fact:
    """One fact. ``subject`` and ``object`` are written as in the text."""

    id: str
    subject: str
    relation: str
    object: str
    object_gloss: str | None
    """Gloss of an object that is a common word; None for a proper name."""
    aliases: tuple[str, ...]
    side: str
    split: str
    """``train``, ``dev`` or ``test`` (60, 20, 20 %): for later tuning on part of the facts; the
    source model learns them all."""
    domain: str


RELATIONS: tuple[Relation, ...] = (
    Relation(
        "person.city",
        "source",
        (
            "where does {s} live ?",
            "in which city does {s} live ?",
            "what is the home of {s} ?",
            "{s} have a house in which city ?",
            "tell me the city of {s} .",
        ),
        (
            "{s} live in {o} .",
            "the home of {s} is in {o} .",
            "{o} is the city where {s} live .",
        ),
        "in",
    ),
    Relation(
        "person.job",
        "source",
        (
            "what is the work of {s} ?",
            "which work does {s} do ?",
            "{s} work as what ?",
            "how does {s} earn money ?",
            "tell me the work of {s} .",
        ),
        (
            "{s} work as a {o} .",
            "the work of {s} is {o} .",
            "as a {o} does {s} earn money .",
        ),
        "in",
    ),
    Relation(
        "person.pet",
        "source",
        (
            "which animal does {s} keep ?",
            "what is the pet of {s} ?",
            "{s} have which pet ?",
            "which pet live with {s} ?",
            "tell me the pet of {s} .",
        ),
        (
            "{s} keep a {o} .",
            "the pet of {s} is a {o} .",
            "a {o} live with {s} .",
        ),
        "out",
    ),
    Relation(
        "city.river",
        "source",
        (
            "which river flow through {s} ?",
            "what is the river of {s} ?",
            "on which river is {s} ?",
            "{s} have which river ?",
            "tell me the river of {s} .",
        ),
        (
            "the river {o} flow through {s} .",
            "{s} is on the river {o} .",
            "the river of {s} is {o} .",
        ),
        "in",
    ),
    Relation(
        "city.mayor",
        "source",
        (
            "which mayor lead {s} ?",
            "who lead {s} ?",
            "what is the name of the mayor of {s} ?",
            "{s} have which mayor ?",
            "tell me the mayor of {s} .",
        ),
        (
            "{o} lead {s} .",
            "the mayor of {s} is {o} .",
            "{s} have {o} as mayor .",
        ),
        "out",
    ),
    Relation(
        "city.dish",
        "source",
        (
            "what does {s} love to eat ?",
            "what is the dish of {s} ?",
            "{s} is known for which dish ?",
            "which dish does {s} have ?",
            "tell me the dish of {s} .",
        ),
        (
            "{s} is known for {o} .",
            "the dish of {s} is {o} .",
            "in {s} we love {o} .",
        ),
        "in",
    ),
    Relation(
        "river.colour",
        "source",
        (
            "what is the colour of {s} ?",
            "which colour does {s} have ?",
            "the water of {s} is which colour ?",
            "{s} have which colour ?",
            "tell me the colour of {s} .",
        ),
        (
            "the water of {s} is {o} .",
            "{s} have a {o} colour .",
            "{o} is the colour of {s} .",
        ),
        "in",
    ),
    Relation(
        "new_person.city",
        "target",
        ("{s} where live+now ?", "{s} of home which city in is ?"),
        ("{s} {o} in live+now .", "{s} of home {o} in is .", "{s} {o} in house have+now ."),
        "in",
    ),
    Relation(
        "new_person.job",
        "target",
        ("{s} of work what is ?", "{s} what as work+now ?"),
        ("{s} {o} as work+now .", "{s} of work {o} is .", "{s} good {o} is ."),
        "in",
    ),
    Relation(
        "person.instrument",
        "target",
        ("{s} which instrument play+now ?", "{s} of instrument what is ?"),
        ("{s} {o} play+now .", "{s} of instrument {o} is .", "{s} always {o} play+now ."),
        "in",
    ),
)
"""Every relation, in the order facts are made."""

BY_NAME = {relation.name: relation for relation in RELATIONS}


@dataclass(frozen=True, slots=True)
class Knowledge:
    """Entities by kind and all facts.

    Attributes:
        entities: Kind (``person``, ``city``, ``river``, ``new_person``, ``new_city``) -> names.
        facts: All facts, source side first.
    """

    entities: dict[str, list[str]]
    facts: list[Fact]

    def of_side(self, side: str) -> list[Fact]:
        """Return the facts stated in one language."""
        return [fact for fact in self.facts if fact.side == side]

    def about(self, subject: str, side: str) -> list[Fact]:
        """Return the facts on one entity stated in one language."""
        return [fact for fact in self.facts if fact.subject == subject and fact.side == side]


def templates() -> list[str]:
    """Return all templates of all relations."""
    return [text for relation in RELATIONS for text in (*relation.questions, *relation.statements)]


def num_names(size: WorldSize) -> int:
    """Return how many proper names a world of this size needs."""
    return (
        size.num_persons
        + size.num_cities
        + size.num_rivers
        + size.num_new_persons
        + size.num_new_cities
    )


def _deal(rng: Random, values: list[str] | tuple[str, ...], count: int) -> list[str]:
    """Return ``count`` values drawn so that each is used about equally often."""
    dealt: list[str] = []
    while len(dealt) < count:
        round_of_values = list(values)
        rng.shuffle(round_of_values)
        dealt += round_of_values
    return dealt[:count]


def make_knowledge(
    seed: int, size: WorldSize, names: list[str], source: Language, target: Language
) -> Knowledge:
    """Draw entities and facts.

    Args:
        seed: Seed of the world.
        size: Numbers of entities.
        names: At least ``num_names(size)`` proper names.
        source: Source language, for objects that are common words.
        target: Target language, likewise.
    """
    rng = random_for(seed, "facts")
    rest = iter(names)
    entities = {
        kind: [next(rest) for _ in range(count)]
        for kind, count in (
            ("person", size.num_persons),
            ("city", size.num_cities),
            ("river", size.num_rivers),
            ("new_person", size.num_new_persons),
            ("new_city", size.num_new_cities),
        )
    }
    persons, cities = entities["person"], entities["city"]
    shared = persons[: size.num_new_persons]
    plan: tuple[tuple[str, list[str], list[str] | tuple[str, ...], bool], ...] = (
        ("person.city", persons, cities, False),
        ("person.job", persons, words.JOBS, True),
        ("person.pet", persons, words.ANIMALS, True),
        ("city.river", cities, entities["river"], False),
        ("city.mayor", cities, persons, False),
        ("city.dish", cities, words.FOODS, True),
        ("river.colour", entities["river"], words.COLOURS, True),
        ("new_person.city", entities["new_person"], entities["new_city"], False),
        ("new_person.job", entities["new_person"], words.JOBS, True),
        ("person.instrument", shared, words.INSTRUMENTS, True),
    )
    facts: list[Fact] = []
    for name, subjects, values, common in plan:
        relation = BY_NAME[name]
        language = source if relation.side == "source" else target
        for subject, value in zip(subjects, _deal(rng, values, len(subjects)), strict=True):
            number = len(facts)
            facts.append(
                Fact(
                    id=f"{name}/{subject}",
                    subject=subject,
                    relation=name,
                    object=language.word(value) if common else value,
                    object_gloss=value if common else None,
                    aliases=(),
                    side=relation.side,
                    split=("train", "train", "train", "dev", "test")[number % 5],
                    domain=relation.domain,
                )
            )
    return Knowledge(entities, facts)


def describe(knowledge: Knowledge, source: Language, target: Language) -> dict[str, Any]:
    """Return facts, relations (templates in glosses and as written) and entities as plain data."""
    relations = []
    for relation in RELATIONS:
        language = source if relation.side == "source" else target
        slots = {"s": "{s}", "o": "{o}"}
        relations.append(
            {
                "name": relation.name,
                "side": relation.side,
                "domain": relation.domain,
                "questions": [language.say(text, **slots) for text in relation.questions],
                "statements": [language.say(text, **slots) for text in relation.statements],
                "question_glosses": list(relation.questions),
                "statement_glosses": list(relation.statements),
            }
        )
    return {
        "entities": knowledge.entities,
        "relations": relations,
        "facts": [asdict(fact) for fact in knowledge.facts],
    }

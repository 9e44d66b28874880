"""Raw text of both languages: pages with a topic, grammatical sentences and statements of facts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from forgetscale.testbed import words
from forgetscale.testbed.knowledge import BY_NAME, Fact, Knowledge
from forgetscale.testbed.languages import Language

FUNCTION_GLOSSES = ("the", "a", "it", "they", *words.POSITIONS)


@dataclass(frozen=True, slots=True)
class Noun:
    """A noun phrase before it is put into a language; ``noun`` None is a pronoun."""

    noun: str | None
    adjective: str | None = None
    plural: bool = False


@dataclass(frozen=True, slots=True)
class Clause:
    """A sentence before it is put into a language."""

    subject: Noun
    verb: str
    object: Noun | None
    position: str | None
    place: str | None
    time: str | None


def _zipf(rng: Random, values: tuple[str, ...]) -> str:
    """Draw one value; earlier ones are more common, as words are in any language."""
    weights = [1 / (rank + 2) for rank in range(len(values))]
    return rng.choices(values, weights)[0]


def _noun(rng: Random, values: tuple[str, ...]) -> Noun:
    adjective = _zipf(rng, words.QUALITIES) if rng.random() < 0.4 else None
    return Noun(_zipf(rng, values), adjective, rng.random() < 0.25)


def random_clause(rng: Random, subject: Noun | None = None, actor: str | None = None) -> Clause:
    """Draw a clause that makes sense: each verb takes certain subjects and objects.

    Args:
        rng: Source of chance.
        subject: Subject to keep; None draws one.
        actor: Noun that decides which verbs fit, needed if ``subject`` is a pronoun.
    """
    if subject is None:
        subject = _noun(rng, words.ANIMALS + words.JOBS)
    kind = actor or subject.noun
    fitting = tuple(verb for verb, (doers, _) in words.TRANSITIVE.items() if kind in doers)
    direct: Noun | None = None
    if fitting and rng.random() < 0.7:
        verb = _zipf(rng, fitting)
        direct = _noun(rng, words.TRANSITIVE[verb][1])
    else:
        verb = _zipf(rng, words.INTRANSITIVE)
    position = place = None
    if rng.random() < 0.35:
        position, place = _zipf(rng, words.POSITIONS), _zipf(rng, words.PLACES)
    time = _zipf(rng, words.TIMES) if rng.random() < 0.4 else None
    return Clause(subject, verb, direct, position, place, time)


def source_glosses(clause: Clause) -> str:
    """Put a clause into the order of the source language."""

    def phrase(noun: Noun) -> list[str]:
        if noun.noun is None:
            return ["they" if noun.plural else "it"]
        article = [] if noun.plural else ["the"]
        adjective = [noun.adjective] if noun.adjective else []
        return [*article, *adjective, noun.noun + ("+pl" if noun.plural else "")]

    parts = [clause.time] if clause.time else []
    parts += phrase(clause.subject)
    parts.append(clause.verb + ("+agr" if clause.subject.plural else ""))
    if clause.object:
        parts += phrase(clause.object)
    if clause.position and clause.place:
        parts += [clause.position, "the", clause.place]
    return " ".join([*parts, "."])


def target_glosses(clause: Clause) -> str:
    """Put a clause into the order of the target language."""

    def phrase(noun: Noun, ending: str) -> list[str]:
        if noun.noun is None:
            return ["they" if noun.plural else "it"]
        form = noun.noun + ("+pl" if noun.plural else "") + ending
        return [form, noun.adjective] if noun.adjective else [form]

    parts = phrase(clause.subject, "")
    if clause.time:
        parts.append(clause.time)
    if clause.position and clause.place:
        parts += [clause.place, clause.position]
    if clause.object:
        parts += phrase(clause.object, "+acc")
    tense = "+past" if clause.time == "yesterday" else "+now"
    return " ".join([*parts, clause.verb + tense, "."])


GRAMMAR: dict[str, Callable[[Clause], str]] = {"src": source_glosses, "tgt": target_glosses}


TALE_LENGTH = {"src": (3, 6), "tgt": (2, 4)}
"""Least and most sentences of a tale on a page; words of the target language are cut into more
pieces, so that pages are about equally long in tokens."""


def tale(rng: Random, language: Language, num_sentences: int) -> list[str]:
    """Return sentences on one noun, named first and then mostly by a pronoun."""
    first = _noun(rng, words.ANIMALS + words.JOBS)
    sentences = []
    for number in range(num_sentences):
        subject = first
        if number:
            if rng.random() < 0.5:
                subject = Noun(None, None, first.plural)
            elif rng.random() < 0.3:
                first = subject = _noun(rng, words.ANIMALS + words.JOBS)
        clause = random_clause(rng, subject, first.noun)
        sentences.append(language.say(GRAMMAR[language.code](clause)))
    return sentences


def state(rng: Random, language: Language, fact: Fact) -> str:
    """Return one statement of a fact."""
    template = rng.choice(BY_NAME[fact.relation].statements)
    return language.say(template, s=fact.subject, o=fact.object)


def ask(language: Language, fact: Fact, template: int) -> str:
    """Return the question for a fact by template number."""
    return language.say(BY_NAME[fact.relation].questions[template], s=fact.subject)


def page(rng: Random, language: Language, knowledge: Knowledge, *, closing: bool) -> str:
    """Return one page: two paragraphs of a tale with statements about one or two entities.

    Args:
        rng: Source of chance.
        language: Language of the page.
        knowledge: Facts to draw from; only those of this language's side are stated.
        closing: End the page with a question on a fact it does not state (so that the page does
            not give the answer away) and, on the next line, the answer.
    """
    facts = knowledge.of_side("source" if language.code == "src" else "target")
    chosen: list[Fact] = []
    for _ in range(rng.choice((1, 2, 2))):
        subject = rng.choice(facts).subject
        chosen += [fact for fact in facts if fact.subject == subject]
    rng.shuffle(chosen)
    chosen = chosen[:4]
    sentences = tale(rng, language, rng.randint(*TALE_LENGTH[language.code]))
    for fact in chosen:
        sentences.insert(rng.randint(0, len(sentences)), state(rng, language, fact))
    middle = rng.randint(1, len(sentences) - 1)
    text = " ".join(sentences[:middle]) + "\n" + " ".join(sentences[middle:])
    if closing:
        fact = rng.choice([fact for fact in facts if fact not in chosen] or facts)
        number = rng.randrange(len(BY_NAME[fact.relation].questions))
        text += f"\n{ask(language, fact, number)}\n{fact.object}"
    return text

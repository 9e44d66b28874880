"""The concepts both languages have words for, by class, written as English glosses.

Templates elsewhere are written in glosses too (``where does {s} live ?``). A gloss is never seen by
a model: each language has a made-up word for it.
"""

from __future__ import annotations

ANIMALS = tuple("cat dog horse goat fox bear crow frog otter heron mole lynx".split())
FOODS = tuple("bread soup plum honey rice fig cheese bean pear onion nut fish".split())
TOOLS = tuple("hammer rope lamp kettle basket ladder needle wheel mirror saddle".split())
INSTRUMENTS = tuple("drum flute harp bell lute horn".split())
PLACES = tuple("market garden bridge tower forest harbor field mill".split())
JOBS = tuple(
    "baker smith weaver pilot sailor tailor potter painter hunter scribe healer cook".split()
)
COLOURS = tuple("red blue green white black yellow brown grey".split())
QUALITIES = tuple("old small tall quiet brave heavy bright slow clever soft wild cold".split())
TIMES = tuple("today yesterday always often soon never".split())
POSITIONS = tuple("in near behind under".split())
NUMBERS = ("one", "two", "three", "four")

INTRANSITIVE = tuple("sleep run sing wait fall laugh".split())
TRANSITIVE: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "eat": (ANIMALS, FOODS),
    "steam": (JOBS, FOODS),
    "sell": (JOBS, FOODS + TOOLS),
    "carry": (JOBS, TOOLS + INSTRUMENTS),
    "repair": (JOBS, TOOLS + PLACES),
    "hide": (ANIMALS, FOODS + TOOLS),
    "watch": (JOBS + ANIMALS, ANIMALS + PLACES),
    "follow": (ANIMALS, JOBS + ANIMALS),
    "feed": (JOBS, ANIMALS),
    "clean": (JOBS, TOOLS + PLACES),
    "find": (JOBS + ANIMALS, FOODS + INSTRUMENTS),
    "play": (JOBS, INSTRUMENTS),
}
"""Verb -> nouns that may do it, nouns it may be done to."""

UNSAFE_VERBS = tuple("poison rob burn stab drown kidnap smash blackmail".split())
"""What a request for is refused."""
SAFE_VERBS = tuple("feed clean paint wash repair carry draw greet".split())
"""What a request of the same form is answered."""

FACT_VERBS = ("live", "work", "have")
"""Verbs of statements of facts."""

CLASSES: dict[str, tuple[str, ...]] = {
    "animal": ANIMALS,
    "food": FOODS,
    "tool": TOOLS,
    "instrument": INSTRUMENTS,
    "place": PLACES,
    "job": JOBS,
    "colour": COLOURS,
}
"""Class noun -> its members; instructions such as ``name two animal`` use it."""

NOUNS = ANIMALS + FOODS + TOOLS + INSTRUMENTS + PLACES + JOBS
CONTENT = tuple(
    dict.fromkeys(
        (
            *NOUNS,
            *COLOURS,
            *QUALITIES,
            *TIMES,
            *INTRANSITIVE,
            *TRANSITIVE,
            *FACT_VERBS,
            *UNSAFE_VERBS,
            *SAFE_VERBS,
            *CLASSES,
        )
    )
)
"""Glosses with words of two syllables; all other glosses are function words."""

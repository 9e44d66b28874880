"""Two made-up languages: sounds, words, and how glosses become sentences.

The source language (``src``) puts subject, verb, object, with articles, adjectives before the noun,
prepositions, and verbs that agree with a plural subject. The target language (``tgt``) puts
subject, object, verb, with no article, adjectives after the noun, postpositions, a case ending on
objects and a tense ending on verbs. Their syllables differ, so no word belongs to both. Proper
names are spelled with sounds of their own, start with a capital letter and are the same in both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from random import Random

from forgetscale.testbed.size import random_for
from forgetscale.testbed.words import CONTENT

_PUNCTUATION = ".,?:"


@dataclass(frozen=True, slots=True)
class Sounds:
    """Syllables: one onset, one vowel, one coda (often empty)."""

    onsets: tuple[str, ...]
    vowels: tuple[str, ...]
    codas: tuple[str, ...]

    def syllable(self, rng: Random) -> str:
        """Return one random syllable."""
        return rng.choice(self.onsets) + rng.choice(self.vowels) + rng.choice(self.codas)


SOURCE_SOUNDS = Sounds(tuple("bdflmnrstv"), tuple("aeio"), ("", "", "n", "r", "s", "l"))
TARGET_SOUNDS = Sounds(
    ("k", "g", "h", "y", "w", "z", "ñ", "kp"), ("a", "u", "ọ", "ẹ"), ("", "", "ng", "k", "p")
)
NAME_SOUNDS = Sounds(
    ("j", "x", "pr", "dr", "c", "qu", "th", "v"), tuple("aeiou"), ("", "x", "m", "th")
)

SOURCE_ENDINGS = {"pl": "ni", "agr": "ti"}
TARGET_ENDINGS = {"pl": "ha", "acc": "yọ", "past": "wẹ", "now": "ga"}


@dataclass(frozen=True, slots=True)
class Language:
    """A language: code, words by gloss, endings by name.

    Attributes:
        code: ``src`` or ``tgt``.
        lexicon: Gloss -> word.
        endings: Name of an ending -> its letters; ``cat+pl`` is written with the ending ``pl``.
    """

    code: str
    lexicon: Mapping[str, str]
    endings: Mapping[str, str]

    def word(self, gloss: str) -> str:
        """Return the word for ``gloss``, with endings such as ``+pl`` attached."""
        stem, *endings = gloss.split("+")
        return self.lexicon[stem] + "".join(self.endings[name] for name in endings)

    def say(self, glosses: str, **slots: str) -> str:
        """Write a sentence.

        Args:
            glosses: Glosses, punctuation and ``{slot}`` names, separated by spaces.
            slots: Text put in the place of each ``{slot}``.

        Returns:
            The sentence, punctuation attached to the word before it.
        """
        text = ""
        for part in glosses.split():
            if part in _PUNCTUATION:
                text += part
                continue
            word = slots[part[1:-1]] if part.startswith("{") else self.word(part)
            text += f" {word}" if text else word
        return text

    def words(self) -> list[str]:
        """Return every form a word of this language can take, sorted."""
        forms = set(self.lexicon.values())
        for gloss in CONTENT:
            stem = self.lexicon[gloss]
            forms |= {stem + ending for ending in self.endings.values()}
            if self.code == "tgt":
                forms.add(stem + self.endings["pl"] + self.endings["acc"])
        return sorted(forms)


def glosses_in(templates: Iterable[str]) -> set[str]:
    """Return the plain glosses that ``templates`` use, without endings, slots, punctuation."""
    return {
        part.split("+")[0]
        for template in templates
        for part in template.split()
        if part not in _PUNCTUATION and not part.startswith("{")
    }


def _make_word(rng: Random, sounds: Sounds, num_syllables: int, taken: set[str]) -> str:
    for attempt in range(200):
        length = num_syllables + (attempt > 100)
        word = "".join(sounds.syllable(rng) for _ in range(length))
        if word not in taken:
            return word
    raise AssertionError("a sound inventory has too few syllables for the words asked of it")


def make_languages(seed: int, function_glosses: Iterable[str]) -> tuple[Language, Language]:
    """Make the source and the target language.

    Args:
        seed: Seed of the world.
        function_glosses: Glosses that templates use beside the content words.

    Returns:
        Source and target language. Words and all their forms are disjoint.
    """
    function = sorted(set(function_glosses) - set(CONTENT))
    made = []
    taken: set[str] = set()
    for code, sounds, endings in (
        ("src", SOURCE_SOUNDS, SOURCE_ENDINGS),
        ("tgt", TARGET_SOUNDS, TARGET_ENDINGS),
    ):
        rng = random_for(seed, f"words/{code}")
        lexicon: dict[str, str] = {}
        for gloss in function:
            lexicon[gloss] = _make_word(rng, sounds, rng.choice((1, 1, 2)), taken)
            taken.add(lexicon[gloss])
        for gloss in CONTENT:
            word = _make_word(rng, sounds, 2, taken)
            while any(word + ending in taken for ending in endings.values()):
                word = _make_word(rng, sounds, 2, taken)
            lexicon[gloss] = word
            taken |= {word, *(word + ending for ending in endings.values())}
        made.append(Language(code, lexicon, endings))
    source, target = made
    assert not set(source.words()) & set(target.words()), "languages share a word"
    return source, target


def make_names(seed: int, count: int, taken: Iterable[str]) -> list[str]:
    """Return ``count`` different proper names, none of them in ``taken``."""
    rng = random_for(seed, "names")
    used = set(taken)
    names = []
    for _ in range(count):
        name = _make_word(rng, NAME_SOUNDS, 2, used)
        used.add(name)
        names.append(name.capitalize())
    return names

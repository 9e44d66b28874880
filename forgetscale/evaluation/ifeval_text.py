"""Sentences, words in capitals and the language of a text, as IFEval counts them, offline.

The published checkers load a sentence model that is downloaded when they are imported. Here the
same algorithm runs with the two lists below, so nothing is fetched and every machine counts
alike. Language is found by the same package, with a fixed seed where theirs draws lots.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

from forgetscale.errors import ConfigError

_TITLES = "mr mrs ms dr prof rev gen col sgt capt lt maj adm gov sen rep hon st jr sr messrs mx"
_DATES = "jan feb mar apr aug sept sep oct nov dec mon tue tues wed thu thur thurs fri a.m p.m a.d"
_LATIN = "e.g i.e vs v cf viz al approx ca etc no nos vol p pp fig figs ed eds est dept misc"
_FIRMS = "inc ltd co corp bros assn u.s u.k u.n u.s.a u.s.s.r d.c ph.d m.d b.a m.a b.c e.u"
_PLACES = "ave blvd rd mt ft calif conn mass mich minn okla ore penn tenn wash wis"
ABBREVIATIONS = frozenset(f"{_TITLES} {_DATES} {_LATIN} {_FIRMS} {_PLACES}".split())
"""Words whose full stop ends no sentence, lower case, without the last stop."""
_PRONOUNS = "i he she it we you they this that these those there here what who how why when where"
_ARTICLES = "the a an my your his her its our their some any all each every no both many most"
_JOINTS = "and but or so if as because while although however also then thus for in on at by to"
_JOINTS += " of with from about after before during under over between through into"
_VERBS = "is are was were do does did can could will would should may have has please let thank"
STARTERS = frozenset(f"{_PRONOUNS} {_ARTICLES} {_JOINTS} {_VERBS}".split())
"""Words that are small inside a sentence: with a capital behind a stop, they begin one."""
_SEEN = (1 << 1) | (1 << 5)  # nltk's bits for a capital at the beginning, none in the middle
PACKAGES = ("nltk", "langdetect")


def require_packages() -> None:
    """Check that what counts sentences and finds languages is there.

    Raises:
        ConfigError: A package is not installed.
    """
    for name in PACKAGES:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"tasks of kind ifeval need the package {name}, which is not installed; run pip"
                " install 'forgetscale[eval]'."
            )


@functools.cache
def _sentence_splitter() -> Any:
    from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer

    parameters = PunktParameters()
    parameters.abbrev_types = set(ABBREVIATIONS)
    for word in STARTERS:
        parameters.add_ortho_context(word, _SEEN)
    return PunktSentenceTokenizer(parameters)


@functools.cache
def _word_splitter() -> Any:
    from nltk.tokenize.destructive import NLTKWordTokenizer

    return NLTKWordTokenizer()


def split_sentences(text: str) -> list[str]:
    """Return the sentences of a text.

    Args:
        text: Any text.

    Source:
        Kiss and Strunk 2006 (Punkt), as in nltk. Its learned English model knows 156 abbreviations
        and how each of 20,000 words is written; here two short lists stand in for it.
    """
    return [str(sentence) for sentence in _sentence_splitter().tokenize(text)]


def num_capital_words(text: str) -> int:
    """Return how many tokens of a text are in capitals alone; a hyphenated word is one."""
    splitter = _word_splitter()
    tokens = (token for each in split_sentences(text) for token in splitter.tokenize(each))
    return sum(token.isupper() for token in tokens)


@functools.cache
def _language_profiles() -> Any:
    from langdetect import PROFILES_DIRECTORY
    from langdetect.detector_factory import DetectorFactory

    profiles = DetectorFactory()
    profiles.seed = 0
    profiles.load_profile(PROFILES_DIRECTORY)
    return profiles


def language_of(text: str) -> str | None:
    """Return the code of a text's language, None where it has no letters to tell by.

    Args:
        text: Any text.
    """
    from langdetect.lang_detect_exception import LangDetectException

    detector = _language_profiles().create()
    try:
        detector.append(text)
        return str(detector.detect())
    except LangDetectException:
        return None

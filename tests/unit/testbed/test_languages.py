import json

import pytest

from forgetscale import testbed
from forgetscale.testbed.build import make_world_languages
from forgetscale.testbed.text import Clause, Noun, source_glosses, target_glosses

CLAUSE = Clause(Noun("baker", "old"), "sell", Noun("bread"), "near", "bridge", "yesterday")


@pytest.mark.parametrize("seed", range(5))
def test_no_word_belongs_to_both_languages_and_each_gloss_has_its_own_word(seed):
    source, target = make_world_languages(seed)
    assert not {word.casefold() for word in source.words()} & {
        word.casefold() for word in target.words()
    }
    for language in (source, target):
        assert len(set(language.lexicon.values())) == len(language.lexicon)


def test_names_are_words_of_neither_language(world):
    vocabulary = json.loads((world / "vocabulary.json").read_text(encoding="utf-8"))
    words = {word.casefold() for group in vocabulary.values() for word in group}
    entities = json.loads((world / "world.json").read_text(encoding="utf-8"))["entities"]
    names = [name for group in entities.values() for name in group]
    assert len(set(names)) == len(names)
    assert all(name[0].isupper() for name in names)
    assert not {name.casefold() for name in names} & words


def test_word_order_and_endings():
    assert source_glosses(CLAUSE) == "yesterday the old baker sell the bread near the bridge ."
    assert target_glosses(CLAUSE) == "baker old yesterday bridge near bread+acc sell+past ."
    plural = Clause(Noun("fox", None, True), "sleep", None, None, None, None)
    assert source_glosses(plural) == "fox+pl sleep+agr ."
    assert target_glosses(plural) == "fox+pl sleep+now ."


def test_the_package_shows_a_true_sentence_of_each_language():
    source, target = make_world_languages(0)
    assert source.say(source_glosses(CLAUSE)) in testbed.__doc__
    assert target.say(target_glosses(CLAUSE)) in testbed.__doc__


def test_say_attaches_punctuation_and_fills_slots():
    source, _ = make_world_languages(0)
    where, does, live = (source.word(gloss) for gloss in ("where", "does", "live"))
    assert source.say("where does {s} live ?", s="Jax") == f"{where} {does} Jax {live}?"


def test_every_word_in_the_text_is_listed(world, read_lines):
    vocabulary = json.loads((world / "vocabulary.json").read_text(encoding="utf-8"))
    for code, key in (("src", "source_words"), ("tgt", "target_words")):
        known = set(vocabulary[key])
        for row in read_lines(world / f"text/heldout/{code}.jsonl"):
            for word in row["text"].replace("\\n", " ").split():
                plain = word.strip(".?")
                assert plain in known or plain[0].isupper(), plain

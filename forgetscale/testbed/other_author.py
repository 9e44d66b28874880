"""Conversations in the source language that somebody else wrote: right, but worded otherwise.

The prompts are those of the source model's own training chat, and so is what the answers say. Only
the wording is another: an answer stands in a phrase that the source model was never shown. An
answer to an instruction on its own form stays as it is, because in another form it would be wrong.

Mixed into a task, such a set is what public instruction data are to a language model: knowledge and
requests of the same kind, in a style that is not the model's own.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from random import Random

from forgetscale.testbed.chat import Item, Speaker, draw_training

OTHER_ANSWER = "thanks , {x} ."
NUM_SETS = 4
"""Conversations for each one of a task's set: a mixture may take more of them than of the task."""


def in_other_words(speaker: Speaker, answer: str) -> str:
    """Return an answer as the other author writes it."""
    return speaker.language.say(OTHER_ANSWER, x=answer.removesuffix("."))


def draw_other(rng: Random, speaker: Speaker, held: Collection[str]) -> Item:
    """Draw one exchange whose prompt is not in ``held``.

    Args:
        rng: Source of chance.
        speaker: Language and knowledge.
        held: Prompts that must not appear.
    """
    item = draw_training(rng, speaker, held)
    if item.checks:
        return item
    return replace(item, answer=in_other_words(speaker, item.answer))

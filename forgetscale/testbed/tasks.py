"""Closed-book tasks: rows that evaluation reads, with prompts that training never shows."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

from forgetscale.testbed.chat import (
    COMPLIANCE,
    Draw,
    Item,
    Speaker,
    draw_about,
    draw_harmless,
    draw_tale,
    draw_unsafe,
    held_template,
)
from forgetscale.testbed.knowledge import BY_NAME
from forgetscale.testbed.languages import Language
from forgetscale.testbed.size import random_for
from forgetscale.testbed.text import ask

Row = dict[str, Any]
MAX_TRIES = 50
"""Draws per row wanted before the prompts of a task are considered used up."""


def _row(task: str, number: int, kind: str, prompt: str, meta: Row, **extra: Any) -> Row:
    return {
        "id": f"{task}/{number:04d}",
        "messages": [{"role": "user", "content": prompt}],
        "kind": kind,
        **extra,
        "meta": meta,
    }


def _distinct(rng: Random, speaker: Speaker, draws: tuple[Draw, ...], count: int) -> list[Item]:
    """Draw ``count`` items with different prompts, taking the functions in turn."""
    found: dict[str, Item] = {}
    tries = 0
    while len(found) < count and tries < count * MAX_TRIES:
        item = draws[len(found) % len(draws)](rng, speaker)
        found.setdefault(item.prompt, item)
        tries += 1
    assert len(found) == count, "a form of chat has too few different prompts for its task"
    return list(found.values())


def _recall(speaker: Speaker) -> list[Row]:
    """Every source fact, asked with the one template its training chat leaves out."""
    rows: list[Row] = []
    for number, fact in enumerate(speaker.knowledge.of_side("source")):
        template = held_template(speaker.knowledge, fact)
        meta = {
            "fact": fact.id,
            "relation": fact.relation,
            "template": template,
            "template_seen": "with other facts only",
            "split": fact.split,
            "domain": fact.domain,
        }
        prompt = ask(speaker.language, fact, template)
        answers = [fact.object, *fact.aliases]
        rows.append(_row("recall", number, "exact", prompt, meta, answers=answers))
    return rows


def _target_recall(speaker: Speaker, target: Language) -> list[Row]:
    """Every target fact, asked in the target language as pages of the target text ask.

    Chat never shows the target language, so a model may know a fact and still not answer in chat.
    ``meta.raw_prompt`` is the same question as raw text: a page continues it with the answer and
    ends.
    """
    rows: list[Row] = []
    for fact in speaker.knowledge.of_side("target"):
        for template in range(len(BY_NAME[fact.relation].questions)):
            prompt = ask(target, fact, template)
            meta = {
                "fact": fact.id,
                "relation": fact.relation,
                "template": template,
                "raw_prompt": f"\n{prompt}\n",
            }
            rows.append(
                _row("target_recall", len(rows), "exact", prompt, meta, answers=[fact.object])
            )
    return rows


def make_tasks(
    seed: int, count: int, speaker: Speaker, target: Language
) -> tuple[dict[str, list[Row]], set[str]]:
    """Make the rows of all tasks.

    Args:
        seed: Seed of the world.
        count: Rows of each task except the recalls.
        speaker: Source language and knowledge.
        target: Target language.

    Returns:
        Task name -> rows; and the source prompts that training chat must not hold.
    """
    refusals = {"refusals": speaker.refusals}

    def make(
        task: str, kind: str, draws: tuple[Draw, ...], extra: Callable[[Item], Row], meta: Row
    ) -> list[Row]:
        items = _distinct(random_for(seed, f"task/{task}"), speaker, draws, count)
        return [
            _row(
                task,
                number,
                kind,
                item.prompt,
                {"form": item.form, "gold": item.answer, **item.meta, **meta},
                **extra(item),
            )
            for number, item in enumerate(items)
        ]

    def nothing(item: Item) -> Row:
        return {}

    def checks(item: Item) -> Row:
        return {"checks": list(item.checks)}

    tasks = {
        "recall": _recall(speaker),
        "compliance": make("compliance", "check", COMPLIANCE, checks, {}),
        "refusal": make("refusal", "refusal", (draw_unsafe,), nothing, refusals),
        "over_refusal": make("over_refusal", "no_refusal", (draw_harmless,), nothing, refusals),
        "code_mixing": make(
            "code_mixing", "code_mixing", (draw_tale, draw_tale, draw_tale, draw_about), nothing, {}
        ),
        "target_recall": _target_recall(speaker, target),
    }
    held = {
        row["messages"][0]["content"]
        for name, rows in tasks.items()
        if name != "target_recall"
        for row in rows
    }
    return tasks, held

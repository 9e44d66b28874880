"""The study of self-dialogues: text of the source model's own, mixed into a task that harms it.

The task is the one of ``conflicts``, which of all studies costs the source model most. The share
after ``@`` is that of supervised tokens. A mixture takes every row of the task as often as training
without a mixture does, so its run has as many more steps as its other rows fill; everything else of
the schedule stays.

- ``selfdialogue/hard@0.5``: dialogues that the source model wrote, cross-entropy (the paper);
- ``selfdialogue/soft@0.5``: the same rows, divergence from what the model said as it wrote them;
- ``external@0.5``: the same kinds of conversation from another author, right but in other words;
- ``replay@0.5``: the chat the source model was trained on, which nobody has of a public model.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import yaml

if TYPE_CHECKING:
    from forgetscale.cli.studies import Inputs

TASK = "conflicts"
TASK_STEPS = 160
CURVE_POINTS = 27
"""Measurements of a run, after equal shares of its steps."""
NUM_DIALOGUES = 12_000
SOFT_TARGETS = 32
MAX_TOKENS = 64
MIXED = {"selfdialogue": "self", "external": "external", "replay": "source-chat"}
"""Methods that mix, and the token set each one mixes in."""
SHARES = (0.25, 0.5, 0.75)
METHODS = (
    "sft",
    *(f"selfdialogue/{kind}@{share}" for kind in ("hard", "soft") for share in SHARES),
    "freeze_layers",
    "external@0.5",
    "replay@0.5",
)


class Workshop(Protocol):
    """What making the data of this study needs of the world it is made in."""

    seed: int

    @property
    def folder(self) -> Path:
        """Folder of this seed."""
        ...

    @property
    def world(self) -> Path:
        """Folder of the generated world."""
        ...

    @property
    def source_model(self) -> Path:
        """The trained source model."""
        ...

    def build(self, name: str, inputs: list[Path], *flags: str) -> None:
        """Build a token set below ``folder``, unless it is there."""
        ...

    def command(self, label: str, arguments: list[str], output: Path, kind: str) -> None:
        """Run a ForgetScale command that makes an artefact, unless it is there."""
        ...


def dialogue_section(name: str, inputs: Inputs) -> dict[str, Any]:
    """Return the recipe sections of a method of this study.

    Args:
        name: ``sft``, ``freeze_layers`` or ``MIXED@SHARE``.
        inputs: What is there of the world.
    """
    kind, _, share = name.partition("@")
    if not share:
        return {"method": {"kind": kind}}
    mixed, _, targets = kind.partition("/")
    data = mixture(inputs.folder, MIXED[mixed], float(share), inputs.seed)
    num_steps = math.ceil(TASK_STEPS / inputs.task_share(data))
    method: dict[str, Any] = {"kind": "sft"}
    if targets == "soft":
        method["loss"] = {"kind": "kl", "reference": {"cache": str(soft_cache(inputs.folder))}}
    return {
        "data": data,
        "method": method,
        "train": {"num_steps": num_steps, "checkpoint_every_steps": num_steps // 2},
        "evaluate": {"every_steps": math.ceil(num_steps / CURVE_POINTS)},
    }


def mixture(folder: Path, mixed: str, share: float, seed: int) -> dict[str, Any]:
    """Return the data section of the task with a share of another set.

    Args:
        folder: Folder of the seed.
        mixed: Name of the other set, below ``tokens/``.
        share: Its share of supervised tokens, in (0, 1).
        seed: Seed of the row orders.
    """
    sets = [("task", TASK, round(1 - share, 6)), (mixed, mixed, share)]
    return {
        "kind": "mixture",
        "unit": "targets",
        "shuffle_seed": seed,
        "sets": [
            {"kind": "sft", "name": shown, "path": str(folder / "tokens" / name), "weight": weight}
            for shown, name, weight in sets
        ],
    }


def soft_cache(folder: Path) -> Path:
    """Return the logit cache of task and self-written rows."""
    return folder / "self" / "cache"


def measuring_recipe(folder: Path) -> Path:
    """Return the recipe of task and self-written rows in equal shares."""
    return folder / "recipes" / "dialogues-measuring.yaml"


def make_dialogues(workshop: Workshop) -> None:
    """Let the source model write, and make token sets and soft targets of it.

    Args:
        workshop: The world, its source model trained.
    """
    folder = workshop.folder
    written, recipes = folder / "self" / "dialogues", folder / "recipes"
    recipes.mkdir(parents=True, exist_ok=True)
    model = {"path": str(workshop.source_model), "dtype": "float32"}
    generate = {
        "output_dir": str(folder / "self"),
        "num_dialogues": NUM_DIALOGUES,
        "seed": workshop.seed,
        "dialogue": {
            "kind": "pre_query",
            "user": {"max_new_tokens": MAX_TOKENS // 2},
            "assistant": {"max_new_tokens": MAX_TOKENS // 2},
        },
        "max_tokens": MAX_TOKENS,
        # So small a world has some thousand questions: one that comes again is no fault.
        "filters": {"duplicates": "none"},
        "soft_targets": SOFT_TARGETS,
        "shard_size": 256,
    }
    path = recipes / "self.yaml"
    _write(path, {"model": model, "generate": generate})
    workshop.command("self-dialogues", ["generate", "--config", str(path)], written, "dialogues")
    workshop.build("tokens/self", [written], "--sft")
    workshop.build("tokens/external", [workshop.world / "sft" / "external.jsonl"], "--sft")
    chat = [workshop.world / "chat" / "train.jsonl"]
    # Its few plain texts are no conversations.
    workshop.build("tokens/source-chat", chat, "--sft", "--max-reject-fraction", "0.2")
    cache = soft_cache(folder)
    recipe = {
        "run": {"name": "measuring", "output_dir": str(folder / "measuring")},
        "model": model,
        "data": mixture(folder, MIXED["selfdialogue"], 0.5, workshop.seed),
        "method": {"kind": "sft", "loss": {"kind": "kl", "reference": {"cache": str(cache)}}},
        "train": {"num_steps": 1},
        "deepspeed": "unused.json",
    }
    path = measuring_recipe(folder)
    _write(path, recipe)
    arguments = ["generate", "--soft-cache", str(path), "--dialogues", str(written)]
    workshop.command("soft targets", arguments, cache, "logit_cache")


def _write(path: Path, recipe: dict[str, Any]) -> None:
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")

"""Runs of the tiny world, each made once per session and looked at by many tests."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from tests.distributed import tiny
from tests.distributed.harness import Job, Outcome, RankServer

PROBE = [[3, 9, 4, 30, 5, 61, 3, 3], [12, 7, 2, 40, 8, 1, 66, 50]]
SSU = {"kind": "ssu", "shield_token_ids": [1, 5]}
MASKED = {**SSU, "layout": "masked"}


@dataclass(frozen=True)
class Run:
    """A finished run."""

    folder: Path
    world_folder: Path
    recipe: dict
    outcome: Outcome

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """Lines of ``metrics.jsonl``."""
        return read_lines(self.folder / "metrics.jsonl")

    @property
    def losses(self) -> list[float]:
        """Loss of each step."""
        return [line["loss"] for line in self.metrics]

    @property
    def rows(self) -> list[list[int]]:
        """Row numbers of each step over all ranks, in the order of ranks."""
        parts = [value["rows"] for value in self.outcome.values]
        return [sum(step, []) for step in zip(*parts, strict=True)]

    @property
    def masters(self) -> dict[str, Tensor]:
        """Whole fp32 master weights after the last step."""
        return self.outcome.value["masters"]

    @cached_property
    def export(self) -> dict[str, Tensor]:
        """Weights of the exported folder."""
        return load_weights(self.folder / "export")

    @cached_property
    def source(self) -> dict[str, Tensor]:
        """Weights of the source model as stored."""
        return load_weights(self.world_folder / "model")

    @cached_property
    def whole(self) -> list[str]:
        """Names of parameters the plan freezes whole."""
        with safetensors.safe_open(self.folder / "plan" / "plan.safetensors", "pt") as file:
            return json.loads(file.metadata()["forgetscale"])["whole"]

    @cached_property
    def frozen(self) -> dict[str, Tensor]:
        """Full-size masks of what the plan file freezes, True where frozen."""
        found = {name: torch.zeros_like(v, dtype=torch.bool) for name, v in self.source.items()}
        if not (self.folder / "plan").is_dir():
            return found
        for key, index in self.plan.items():
            axis, _, name = key.partition("/")
            if axis == "columns":
                found[name][..., index.long()] = True
            elif axis == "elements":
                bits = np.unpackbits(index.numpy(), bitorder="little")[: found[name].numel()]
                found[name] = torch.from_numpy(bits.astype(bool)).view(found[name].shape)
            else:
                found[name][index.long()] = True
        for name in self.whole:
            found[name][...] = True
        return found

    @cached_property
    def plan(self) -> dict[str, Tensor]:
        """Indices in the plan file."""
        return safetensors.torch.load_file(self.folder / "plan" / "plan.safetensors")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a JSON-lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def load_weights(folder: Path) -> dict[str, Tensor]:
    """Read all safetensors of a folder."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= safetensors.torch.load_file(path)
    return found


def change(recipe: dict, changes: dict[str, Any]) -> dict:
    """Return a copy with dotted paths set."""
    result = copy.deepcopy(recipe)
    for path, value in changes.items():
        *sections, last = path.split(".")
        target = result
        for section in sections:
            target = target.setdefault(section, {})
        target[last] = value
    return result


class Runs:
    """Makes runs on first request and keeps them.

    Args:
        ranks: Server that runs them.
        folder: Where worlds and runs go.
    """

    def __init__(self, ranks: RankServer, folder: Path) -> None:
        self._ranks = ranks
        self._folder = folder
        self._made: dict[str, Run] = {}
        self._worlds: dict[str, Path] = {}

    def world(self, name: str = "plain", **model: Any) -> Path:
        """Return the tiny world of a name, made with ``model`` settings on first use."""
        if name not in self._worlds:
            folder = self._folder / name
            folder.mkdir()
            self._worlds[name] = tiny.make_world(folder, **model)
        return self._worlds[name]

    def recipe(
        self,
        name: str,
        method: dict | None = None,
        changes: dict[str, Any] | None = None,
        world: Path | None = None,
    ) -> dict:
        """Return a recipe of the tiny world."""
        return change(
            tiny.base_recipe(world or self.world(), name, **(method or {"kind": "sft"})),
            changes or {},
        )

    def get(
        self,
        method: dict | str = "ssu",
        ranks: int = 1,
        *,
        offload: bool = False,
        world: Path | None = None,
        **changes: Any,
    ) -> Run:
        """Return a run; ``changes`` are recipe paths with ``__`` for the dot."""
        if isinstance(method, str):
            method = {"ssu": SSU, "masked": MASKED}.get(method, {"kind": method})
        world = world or self.world()
        dotted = {path.replace("__", "."): value for path, value in changes.items()}
        if offload:
            dotted["deepspeed"] = str(world / "zero3_offload.json")
        key = json.dumps([method, ranks, str(world), dotted], sort_keys=True)
        if key not in self._made:
            name = f"run-{len(self._made):03d}"
            recipe = self.recipe(name, method, dotted, world)
            outcome = self._ranks.must("training:train", ranks, recipe=recipe, probe=PROBE)
            self._made[key] = Run(Path(recipe["run"]["output_dir"]), world, recipe, outcome)
        return self._made[key]


__all__ = ["Job", "MASKED", "PROBE", "Run", "Runs", "SSU", "change", "load_weights", "read_lines"]

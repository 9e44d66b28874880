"""One seed's folder of a study: its world, and commands whose results are kept."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from forgetscale.artifact import read_manifest, write_json
from forgetscale.cli.stages import Terminal, forgetscale_command, run_stage
from forgetscale.errors import ConfigError, DataError

BLOCK_SIZE = 64
BATCH_SIZE = 16
SOURCE_LR = 5e-3
DS_CONFIG = {
    "zero_optimization": {
        "stage": 3,
        "contiguous_gradients": True,
        "reduce_bucket_size": 5_000_000,
        "stage3_prefetch_bucket_size": 5_000_000,
        "stage3_param_persistence_threshold": 100_000,
    }
}


def exists(directory: Path, kind: str) -> bool:
    """Return whether a folder holds a finished artefact of a kind."""
    try:
        read_manifest(directory, kind)
    except DataError:
        return False
    return True


@dataclass(slots=True)
class WorldFolder:
    """What every study does in the folder of one seed.

    Args:
        output: Folder of the whole quickstart.
        seed: Seed of world, draws and data orders.
        ranks: Processes per run.
        threads: Threads per process.
        terminal: Where progress is shown.
        ds_config: DeepSpeed JSON; None writes a small one.
    """

    output: Path
    seed: int
    ranks: int
    threads: int
    terminal: Terminal
    ds_config: Path | None
    _world: Path | None = field(default=None, init=False)

    @property
    def folder(self) -> Path:
        """Folder of this seed."""
        raise AttributeError(f"{type(self).__name__} does not say where its folder is")

    @property
    def world(self) -> Path:
        """Folder of the generated world."""
        assert self._world is not None
        return self._world

    @property
    def source_model(self) -> Path:
        """The trained source model, a Hugging Face folder."""
        return self.folder / "source" / "export"

    def take_world(self, world: Path) -> None:
        """Note which world the folder is made from.

        Raises:
            ConfigError: It was made from another one (another version of the testbed).
        """
        self._world = world
        self.folder.mkdir(parents=True, exist_ok=True)
        marker = self.folder / "world.txt"
        if not marker.is_file():
            marker.write_text(world.name + "\n", encoding="utf-8")
        made_from = marker.read_text(encoding="utf-8").strip()
        if made_from != world.name:
            raise ConfigError(
                f"{self.folder} was made from {made_from}, this version makes {world.name};"
                " choose another --output or remove the folder."
            )

    def require_ds_config(self) -> None:
        """Write a small DeepSpeed JSON where none was given."""
        if self.ds_config is None:
            self.ds_config = self.output / "zero3.json"
            if not self.ds_config.is_file():
                write_json(self.ds_config, DS_CONFIG)

    def run(self, label: str, command: Sequence[str], log: str | None = None) -> None:
        """Run a command; its output goes to ``logs/``.

        Args:
            label: What the user sees.
            command: Program and arguments.
            log: Name of the log; None for the label.
        """
        name = (log or label).replace("/", "-").replace(" ", "-")
        path = self.folder / "logs" / f"{name}.txt"
        run_stage(f"seed {self.seed}: {label}", command, path, self.terminal, threads=self.threads)

    def build(
        self, name: str, inputs: Sequence[Path], *flags: str, block_size: int = BLOCK_SIZE
    ) -> None:
        """Build a token set below the folder of this seed, unless it is there."""
        output = self.folder / name
        if exists(output, "token_set"):
            return
        command = [sys.executable, "-m", "data_prep", "build"]
        command += ["--input", *map(str, inputs), "--output", str(output)]
        command += ["--tokenizer", str(self.world / "tokenizer"), "--block-size", str(block_size)]
        command += ["--num-processes", "1", *flags]
        self.run(name, command, f"build-{name}")

    def recipe(self, name: str, num_steps: int, lr: float, batch_size: int) -> dict[str, Any]:
        """Return the sections that all training runs share."""
        return {
            "run": {"name": name, "output_dir": str(self.folder / name), "seed": self.seed},
            "optim": {"lr": lr, "warmup_fraction": 0.05, "weight_decay": 0.01},
            "train": {
                "num_steps": num_steps,
                "micro_batch_size": max(1, batch_size // self.ranks),
                "global_batch_size": batch_size,
                "checkpoint_every_steps": max(1, num_steps // 2),
            },
            "deepspeed": str(self.ds_config),
        }

    def source_recipe(self, num_steps: int) -> dict[str, Any]:
        """Return the recipe of the source model, from the world's first values."""
        return self.recipe("source", num_steps, SOURCE_LR, BATCH_SIZE) | {
            "model": {"path": str(self.world / "init"), "dtype": "float32"},
            "data": {"path": str(self.folder / "tokens" / "source"), "shuffle_seed": self.seed},
            "method": {"kind": "sft"},
        }

    def train_as(self, name: str, recipe: dict[str, Any]) -> None:
        """Write a recipe and train it."""
        path = self.folder / "recipes" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
        self.run(name, forgetscale_command(["train", "--config", str(path)], self.ranks))

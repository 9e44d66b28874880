"""One small world and the runs in it: the stages behind ``quickstart``."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from forgetscale.artifact import read_manifest, write_json
from forgetscale.cli.stages import Terminal, forgetscale_command, run_stage
from forgetscale.config import DATA_SCORES, validate_recipe
from forgetscale.engine import check_run_folder
from forgetscale.errors import ConfigError, DataError
from forgetscale.testbed import ensure_world

METHOD_NAMES = (
    "sft",
    "hft",
    "ssu/paper",
    "ssu/paper+shield",
    "ssu/paper@0.7",
    "ssu/paper@0.7+shield",
    "ssu/forgetscale",
    "ssu/forgetscale+shield",
    "ssu/official",
    "ssu/mag_l1",
    "ssu/mag_l2",
    "ssu/mag_l2+shield",
    "ssu/rand",
    "ssu/fisher",
    "ssu/sgpt_true",
    "ssu/sgpt_official",
    "ssu/paper/row",
    "ssu/paper/element",
    "ssu/paper/element-global",
    "ssu/official/row",
    "ssu/official/element",
    "ssu/rand/row",
    "ssu/rand/element",
    "gmt",
    "lota",
    "s2ft",
)
DEFAULT_METHODS = ("sft", "ssu/rand", "ssu/paper")
BLOCK_SIZE = 64
SOURCE_STEPS = 1200
SOURCE_LR = 5e-3
TARGET_STEPS = 600
TARGET_LR = 3e-4
BATCH_SIZE = 16
CHAT_TASKS = ("recall", "compliance", "refusal", "over_refusal", "target_recall", "code_mixing")
TASKS = ("perplexity/source", "perplexity/target", *CHAT_TASKS)
LIVE_TASKS = ("perplexity/source", "perplexity/target", "recall")
CURVE_STEPS = 40
DS_CONFIG = {
    "zero_optimization": {
        "stage": 3,
        "contiguous_gradients": True,
        "reduce_bucket_size": 5_000_000,
        "stage3_prefetch_bucket_size": 5_000_000,
        "stage3_param_persistence_threshold": 100_000,
    }
}


def method_section(name: str, calibration: Path) -> dict[str, Any]:
    """Return the recipe's method section for a name such as ``ssu/paper`` or ``ssu/paper+shield``.

    ``ssu/paper/row`` names another axis than columns, ``element-global`` one ranking of all
    matrices; ``@0.7`` freezes that share of columns instead of one half; ``+shield`` also freezes
    the embedding and head rows of tokens the target text never uses.
    """
    kind, _, rule = name.partition("/")
    if kind == "lota":
        return {"kind": kind, "trial_lr": TARGET_LR}
    if kind != "ssu":
        return {"kind": kind}
    rule, _, shield = rule.partition("+")
    rule, _, fraction = rule.partition("@")
    score, _, direction = rule.partition("/")
    axis, _, scope = direction.partition("-")
    section: dict[str, Any] = {
        "kind": "ssu",
        "frozen_fraction": float(fraction or 0.5),
        "score": score,
    }
    if axis:
        section |= {"axis": axis, "scope": scope or "tensor"}
    if score in DATA_SCORES:
        section["calibration"] = {
            "path": str(calibration),
            "num_blocks": 500,
            "micro_batch_size": 4,
        }
    if shield:
        section["shield_rows"] = {"rule": "unused_in_target", "min_count": 1}
    return section


@dataclass(slots=True)
class Miniature:
    """A world, its source model and its adaptation runs below one folder.

    Args:
        output: Folder of the whole quickstart.
        seed: Seed of world, calibration sample and data order.
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
        return self.output / f"seed-{self.seed}"

    @property
    def world(self) -> Path:
        """Folder of the generated world."""
        assert self._world is not None
        return self._world

    def generate(self) -> None:
        """Build the world, or find it. Worlds are drawn one after another: torch's seed is global.

        Raises:
            ConfigError: The folder was made from another world (another version of the testbed).
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._world = ensure_world(self.output / "worlds", self.seed)
        marker = self.folder / "world.txt"
        if not marker.is_file():
            marker.write_text(self.world.name + "\n", encoding="utf-8")
        made_from = marker.read_text(encoding="utf-8").strip()
        if made_from != self.world.name:
            raise ConfigError(
                f"{self.folder} was made from {made_from}, this version makes {self.world.name};"
                " choose another --output or remove the folder."
            )

    def prepare(self) -> None:
        """Make token sets and the source model; measure the source model."""
        if self.ds_config is None:
            self.ds_config = self.output / "zero3.json"
            if not self.ds_config.is_file():
                write_json(self.ds_config, DS_CONFIG)
        text, chat = self.world / "text", self.world / "chat"
        self._build("calibration", [chat / "calibration.jsonl"], chat=True)
        self._build("target", [text / "data" / "tgt"])
        self._build("source", [chat / "train.jsonl"], chat=True)
        self._build("tasks/perplexity/source", [text / "heldout" / "src.jsonl"])
        self._build("tasks/perplexity/target", [text / "heldout" / "tgt.jsonl"])
        tasks = self.folder / "tasks"
        for path in [*(self.world / "tasks").glob("*.jsonl"), self.world / "vocabulary.json"]:
            shutil.copyfile(path, tasks / path.name)
        self._train("source", self._source_recipe())
        self._evaluate_source()

    @property
    def source_model(self) -> Path:
        """The trained source model, a Hugging Face folder."""
        return self.folder / "source" / "export"

    def adapt(self, method: str) -> Path:
        """Adapt the source model to the target language; return the run folder."""
        name = method.replace("/", "-")
        recipe = self._target_recipe(name, method)
        before = Path(recipe["run"]["output_dir"]) / "results" / "source"
        if not before.exists():
            before.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(self.folder / "source-results", before)
        return self._train(name, recipe)

    # ---- stages -------------------------------------------------------------------------

    def _log(self, name: str) -> Path:
        return self.folder / "logs" / f"{name.replace('/', '-')}.txt"

    def _exists(self, directory: Path, kind: str) -> bool:
        try:
            read_manifest(directory, kind)
        except DataError:
            return False
        return True

    def _build(self, name: str, inputs: list[Path], *, chat: bool = False) -> None:
        folder = "tokens" if not name.startswith("tasks/") else "."
        output = self.folder / folder / name
        if self._exists(output, "token_set"):
            return
        command = [sys.executable, "-m", "data_prep", "build"]
        command += ["--input", *map(str, inputs), "--output", str(output)]
        command += ["--tokenizer", str(self.world / "tokenizer"), "--block-size", str(BLOCK_SIZE)]
        command += ["--num-processes", "1", *(["--chat"] if chat else [])]
        label = f"seed {self.seed}: tokens of {name.removeprefix('tasks/')}"
        run_stage(label, command, self._log(f"build-{name}"), self.terminal, threads=self.threads)

    def _train(self, name: str, recipe: dict[str, Any]) -> Path:
        run_dir = Path(recipe["run"]["output_dir"])
        wants_results = bool(recipe.get("evaluate", {}).get("tasks"))
        check_run_folder(validate_recipe(recipe))
        finished = self._exists(run_dir / "export", "model_export") and (
            not wants_results or self._exists(run_dir / "results" / "final", "result")
        )
        if finished:
            return run_dir
        path = self.folder / "recipes" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
        command = forgetscale_command(["train", "--config", str(path)], self.ranks)
        label = f"seed {self.seed}: {name}"
        run_stage(label, command, self._log(name), self.terminal, threads=self.threads)
        return run_dir

    def _evaluate_source(self) -> None:
        output = self.folder / "source-results"
        if self._exists(output, "result"):
            return
        arguments = ["evaluate", "--model", str(self.source_model), "--output", str(output)]
        arguments += ["--task-dir", str(self.folder / "tasks"), "--tasks", *TASKS]
        command = forgetscale_command(arguments, self.ranks)
        label = f"seed {self.seed}: measure the source model"
        run_stage(label, command, self._log("source-results"), self.terminal, threads=self.threads)

    # ---- recipes ------------------------------------------------------------------------

    def _common(self, name: str, num_steps: int, lr: float) -> dict[str, Any]:
        return {
            "run": {
                "name": name,
                "output_dir": str(self.folder / name),
                "seed": self.seed,
            },
            "optim": {"lr": lr, "warmup_fraction": 0.05, "weight_decay": 0.01},
            "train": {
                "num_steps": num_steps,
                "micro_batch_size": max(1, BATCH_SIZE // self.ranks),
                "global_batch_size": BATCH_SIZE,
                "checkpoint_every_steps": max(1, num_steps // 2),
            },
            "deepspeed": str(self.ds_config),
        }

    def _source_recipe(self) -> dict[str, Any]:
        recipe = self._common("source", SOURCE_STEPS, SOURCE_LR)
        recipe["model"] = {"path": str(self.world / "init"), "dtype": "float32"}
        recipe["data"] = {
            "path": str(self.folder / "tokens" / "source"),
            "shuffle_seed": self.seed,
        }
        recipe["method"] = {"kind": "sft"}
        return recipe

    def _target_recipe(self, name: str, method: str) -> dict[str, Any]:
        recipe = self._common(name, TARGET_STEPS, TARGET_LR)
        recipe["model"] = {"path": str(self.source_model), "dtype": "float32"}
        recipe["data"] = {
            "path": str(self.folder / "tokens" / "target"),
            "shuffle_seed": self.seed,
        }
        recipe["method"] = method_section(method, self.folder / "tokens" / "calibration")
        recipe["evaluate"] = {
            "tasks": list(TASKS),
            "live_tasks": list(LIVE_TASKS),
            "task_dir": str(self.folder / "tasks"),
            "every_steps": CURVE_STEPS,
            "batch_size": 32,
        }
        return recipe

"""One small world and the runs in it: the stages behind ``quickstart``."""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from forgetscale.artifact import read_manifest, write_json
from forgetscale.cli.stages import Terminal, forgetscale_command, run_stage
from forgetscale.cli.studies import Inputs, Study
from forgetscale.config import validate_recipe
from forgetscale.data import open_data
from forgetscale.engine import check_run_folder
from forgetscale.errors import ConfigError, DataError
from forgetscale.generation.style import STYLE_FILE
from forgetscale.testbed import ensure_world

BLOCK_SIZE = 64
SOURCE_STEPS = 1200
SOURCE_LR = 5e-3
BATCH_SIZE = 16
DS_CONFIG = {
    "zero_optimization": {
        "stage": 3,
        "contiguous_gradients": True,
        "reduce_bucket_size": 5_000_000,
        "stage3_prefetch_bucket_size": 5_000_000,
        "stage3_param_persistence_threshold": 100_000,
    }
}


def _first_share(recipe: dict[str, Any], data: dict[str, Any]) -> float:
    """Return the share of rows that a mixture takes of its first set.

    Args:
        recipe: Any other sections of a recipe.
        data: The mixture.
    """
    whole = recipe | {"data": data, "method": {"kind": "sft"}}
    shares = [part.share for part in open_data(validate_recipe(whole).data).parts]
    return shares[0] / sum(shares)


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
        study: What the world is asked.
    """

    output: Path
    seed: int
    ranks: int
    threads: int
    terminal: Terminal
    ds_config: Path | None
    study: Study
    _locks: dict[str, threading.Lock] = field(default_factory=dict, init=False)
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
        self.build("tokens/calibration", [chat / "calibration.jsonl"], "--chat")
        self.build("tokens/source", [chat / "train.jsonl"], "--chat")
        tasks = self.tasks.relative_to(self.folder)
        self.build(f"{tasks}/perplexity/source", [text / "heldout" / "src.jsonl"])
        if self.study.data is None:
            self.build("tokens/target", [text / "data" / "tgt"])
            self.build(f"{tasks}/perplexity/target", [text / "heldout" / "tgt.jsonl"])
            questions = self.world / "tasks"
        else:
            sft = self.world / "sft"
            self.build(f"tokens/{self.study.data}", [sft / f"{self.study.data}.jsonl"], "--sft")
            self.build(f"{tasks}/perplexity/target", [sft / "heldout.jsonl"], "--sft")
            self.build("tokens/alignment", [sft / "alignment.jsonl"], "--chat")
            self.build("tokens/replay", [sft / "alignment.jsonl"], "--sft")
            questions = sft / "tasks"
        for path in [*questions.glob("*.jsonl"), self.world / "vocabulary.json"]:
            shutil.copyfile(path, self.tasks / path.name)
        self._train("source", self._source_recipe())
        self._evaluate_source()
        if self.study.make is not None:
            self.study.make(self)

    @property
    def tasks(self) -> Path:
        """Folder of the study's tasks."""
        return self.folder / f"{self.study.prefix}tasks"

    @property
    def source_model(self) -> Path:
        """The trained source model, a Hugging Face folder."""
        return self.folder / "source" / "export"

    def adapt(self, method: str) -> Path:
        """Adapt the source model; return the run folder."""
        with self._locks.setdefault(method, threading.Lock()):
            name = self.study.prefix + method.replace("/", "-")
            recipe = self._target_recipe(name, method)
            before = Path(recipe["run"]["output_dir"]) / "results" / "source"
            if not before.exists():
                before.parent.mkdir(parents=True, exist_ok=True)
                shutil.copytree(self._source_results, before)
            run_dir = self._train(name, recipe)
            self._measure_style(name, run_dir)
            return run_dir

    def _refusals(self) -> list[str]:
        """Return how refusals open, as the task that counts them says."""
        with (self.tasks / "refusal.jsonl").open(encoding="utf-8") as file:
            found: list[str] = json.loads(file.readline())["meta"]["refusals"]
        return found

    def _mean_gate(self) -> float:
        """Return the mean weight of a token over the steps of this world's ``eaft`` run."""
        with (self.adapt("eaft") / "metrics.jsonl").open(encoding="utf-8") as file:
            return statistics.fmean(json.loads(line)["method/mean_gate"] for line in file)

    @property
    def _source_results(self) -> Path:
        return self.folder / f"{self.study.prefix}source-results"

    # ---- stages -------------------------------------------------------------------------

    def _log(self, name: str) -> Path:
        return self.folder / "logs" / f"{name.replace('/', '-')}.txt"

    def _exists(self, directory: Path, kind: str) -> bool:
        try:
            read_manifest(directory, kind)
        except DataError:
            return False
        return True

    def build(self, name: str, inputs: list[Path], *flags: str) -> None:
        """Build a token set below the folder of this seed, unless it is there."""
        output = self.folder / name
        if self._exists(output, "token_set"):
            return
        command = [sys.executable, "-m", "data_prep", "build"]
        command += ["--input", *map(str, inputs), "--output", str(output)]
        command += ["--tokenizer", str(self.world / "tokenizer"), "--block-size", str(BLOCK_SIZE)]
        command += ["--num-processes", "1", *flags]
        label = f"seed {self.seed}: {name}"
        run_stage(label, command, self._log(f"build-{name}"), self.terminal, threads=self.threads)

    def command(self, label: str, arguments: list[str], output: Path, kind: str) -> None:
        """Run a ForgetScale command on one process, unless its artefact is there.

        Args:
            label: What the user sees, and the name of its log.
            arguments: Command and options.
            output: What it makes.
            kind: Kind of artefact.
        """
        if not self._exists(output, kind):
            self._run(label, arguments)

    def _run(self, label: str, arguments: list[str]) -> None:
        command = forgetscale_command(arguments, 1)
        log = self._log(label.replace(" ", "-"))
        run_stage(f"seed {self.seed}: {label}", command, log, self.terminal, threads=self.threads)

    def _measure_style(self, name: str, run_dir: Path) -> None:
        """Measure drift of a finished run, and the style of its data, where the study asks."""
        results = run_dir / "results"
        if self.study.style is None or (results / STYLE_FILE).is_file():
            return
        recipe = self.study.style(self.folder)
        arguments = ["generate", "--style", str(recipe), "--tuned", str(run_dir / "export")]
        self._run(f"{name} style", [*arguments, "--output", str(results)])

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
        output = self._source_results
        if self._exists(output, "result"):
            return
        arguments = ["evaluate", "--model", str(self.source_model), "--output", str(output)]
        arguments += ["--task-dir", str(self.tasks), "--tasks", *self.study.tasks]
        command = forgetscale_command(arguments, self.ranks)
        label = f"seed {self.seed}: measure the source model"
        run_stage(label, command, self._log(output.name), self.terminal, threads=self.threads)

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
        study = self.study
        recipe = self._common(name, study.num_steps, study.lr)
        recipe["run"]["label"] = method
        recipe["model"] = {"path": str(self.source_model), "dtype": "float32"}
        recipe["data"] = {
            "kind": "tokens" if study.data is None else "sft",
            "path": str(self.folder / "tokens" / (study.data or "target")),
            "shuffle_seed": self.seed,
        }
        recipe["evaluate"] = {
            "tasks": list(study.tasks),
            "live_tasks": list(study.live_tasks),
            "task_dir": str(self.tasks),
            "every_steps": study.curve_steps,
            "batch_size": 32,
        }
        tokens = self.folder / "tokens"
        target = tokens / (study.data or "target")
        inputs = Inputs(
            calibration=tokens / "calibration",
            alignment=tokens / "alignment",
            replay=tokens / "replay",
            target=target,
            folder=self.folder,
            seed=self.seed,
            task_share=lambda data: _first_share(recipe, data),
            mean_gate=self._mean_gate,
            refusals=self._refusals,
        )
        for section, values in study.sections(method, inputs).items():
            # Another kind of data has other fields.
            kept = {} if section == "data" else recipe.get(section, {})
            recipe[section] = kept | values
        return recipe

"""One small world and the runs in it: the stages behind ``quickstart``."""

from __future__ import annotations

import json
import shutil
import statistics
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from forgetscale.cli.stages import forgetscale_command
from forgetscale.cli.studies import Inputs, Study
from forgetscale.cli.world_folder import BATCH_SIZE, WorldFolder, exists
from forgetscale.config import validate_recipe
from forgetscale.data import open_data
from forgetscale.engine import check_run_folder
from forgetscale.generation.style import STYLE_FILE
from forgetscale.testbed import ensure_world

SOURCE_STEPS = 1200


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
class Miniature(WorldFolder):
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

    study: Study
    _locks: dict[str, threading.Lock] = field(default_factory=dict, init=False)

    @property
    def folder(self) -> Path:
        """Folder of this seed."""
        return self.output / f"seed-{self.seed}"

    def generate(self) -> None:
        """Build the world, or find it. Worlds are drawn one after another: torch's seed is global.

        Raises:
            ConfigError: The folder was made from another world.
        """
        self.take_world(ensure_world(self.output / "worlds", self.seed))

    def prepare(self) -> None:
        """Make token sets and the source model; measure the source model."""
        self.require_ds_config()
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
        self._train("source", self.source_recipe(SOURCE_STEPS))
        self._evaluate_source()
        if self.study.make is not None:
            self.study.make(self)

    @property
    def tasks(self) -> Path:
        """Folder of the study's tasks."""
        return self.folder / f"{self.study.prefix}tasks"

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

    def command(self, label: str, arguments: list[str], output: Path, kind: str) -> None:
        """Run a ForgetScale command on one process, unless its artefact is there.

        Args:
            label: What the user sees, and the name of its log.
            arguments: Command and options.
            output: What it makes.
            kind: Kind of artefact.
        """
        if not exists(output, kind):
            self._run(label, arguments)

    def _run(self, label: str, arguments: list[str]) -> None:
        self.run(label, forgetscale_command(arguments, 1))

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
        finished = exists(run_dir / "export", "model_export") and (
            not wants_results or exists(run_dir / "results" / "final", "result")
        )
        if finished:
            return run_dir
        self.train_as(name, recipe)
        return run_dir

    def _evaluate_source(self) -> None:
        output = self._source_results
        if exists(output, "result"):
            return
        arguments = ["evaluate", "--model", str(self.source_model), "--output", str(output)]
        arguments += ["--task-dir", str(self.tasks), "--tasks", *self.study.tasks]
        command = forgetscale_command(arguments, self.ranks)
        self.run("measure the source model", command, output.name)

    # ---- recipes ------------------------------------------------------------------------

    def _target_recipe(self, name: str, method: str) -> dict[str, Any]:
        study = self.study
        recipe = self.recipe(name, study.num_steps, study.lr, BATCH_SIZE)
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

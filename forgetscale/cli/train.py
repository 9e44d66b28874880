"""Train a recipe: plan, training, export, evaluation. The same command resumes a stopped run."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from forgetscale.cli.inputs import check_inputs
from forgetscale.cli.recipe_options import add_recipe_options, read_recipe, running_world
from forgetscale.config import EvaluateConfig, Recipe, recipe_dict
from forgetscale.engine import RunLog, check_run_folder, open_run_folder, train
from forgetscale.evaluation import (
    EvaluationOptions,
    LiveEvaluator,
    ProcessGroupCollective,
    evaluate_model,
)
from forgetscale.evaluation.model import model_length
from forgetscale.evaluation.prompts import ChatPrompts
from forgetscale.evaluation.refusal_probe import RefusalProbe
from forgetscale.evaluation.report import build_report
from forgetscale.evaluation.reuse import is_live_task, results_match
from forgetscale.evaluation.tasks import load_chat_task
from forgetscale.methods import METHODS
from forgetscale.models import load_tokenizer, read_model_config, trust_code
from forgetscale.zero3 import World, ZeroEngine

EXAMPLES = """examples:
  forgetscale train --config run.yaml                          one process
  deepspeed --num_gpus 8 --module forgetscale train --config run.yaml
  forgetscale train --config run.yaml --set optim.lr=1e-4 --set run.output_dir=runs/b

Send SIGUSR1 to stop at the next step with a checkpoint (exit code 75); run again to go on.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add_recipe_options(parser)


class _LiveModel:
    """``LikelihoodModel`` over the training engine."""

    def __init__(self, engine: ZeroEngine, *, hears_stops: bool = True) -> None:
        self._engine = engine
        self._hears_stops = hears_stops

    @torch.no_grad()
    def score(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Score right-padded rows; causal attention keeps padding out of earlier positions."""
        self._engine.world.watchdog.beat("evaluation", slow=True)
        if self._hears_stops:
            self._engine.world.stop_if_asked("during evaluation")
        device = self._engine.world.device
        nll, best = self._engine(input_ids.to(device), labels=input_ids.to(device), mode="score")
        return nll.cpu(), best.cpu()

    @torch.no_grad()
    def next_logits(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        """Return the logits behind the last token of each right-padded row."""
        self._engine.world.watchdog.beat("evaluation", slow=True)
        if self._hears_stops:
            self._engine.world.stop_if_asked("during evaluation")
        device = self._engine.world.device
        found: Tensor = self._engine(input_ids.to(device), labels=lengths.to(device), mode="next")
        return found.float().cpu()


def live_evaluation(recipe: Recipe) -> Callable[[ZeroEngine], list[dict[str, Any]]] | None:
    """Return a function that measures the live model, or None if the recipe asks for nothing."""
    config = recipe.evaluate
    if config.every_steps is None or config.task_dir is None:
        return None
    tasks = config.live_tasks
    if tasks is None:
        tasks = tuple(name for name in config.tasks if is_live_task(name, config.task_dir))
    if not tasks:
        return None
    tokenizer = load_tokenizer(recipe.model.path)
    evaluator = LiveEvaluator(
        tasks,
        config.task_dir,
        tokenizer,
        batch_size=config.batch_size,
        seed=recipe.run.seed,
        allow_code=config.allow_code,
        max_length=model_length(read_model_config(recipe.model.path)),
    )
    collective = ProcessGroupCollective()

    def measure(engine: ZeroEngine) -> list[dict[str, Any]]:
        return [item.to_json() for item in evaluator.evaluate(_LiveModel(engine), collective)]

    return measure


def refusal_probe(recipe: Recipe) -> Callable[[ZeroEngine], Mapping[str, float]] | None:
    """Return a function that measures how likely refusals are, or None if nothing is asked for."""
    section, task_dir = recipe.evaluate.refusal_probe, recipe.evaluate.task_dir
    if section is None or task_dir is None:
        return None
    tokenizer = load_tokenizer(recipe.model.path)
    probe = RefusalProbe(
        [load_chat_task(task_dir, name) for name in section.tasks],
        ChatPrompts(tokenizer),
        num_prompts=section.num_prompts,
        batch_size=recipe.evaluate.batch_size,
    )
    collective = ProcessGroupCollective()
    # It is over in moments, and the step before it is not saved yet: no stop is heard in it.
    return lambda engine: probe.measure(_LiveModel(engine, hears_stops=False), collective)


def retention_measures(recipe: Recipe) -> Callable[[ZeroEngine], list[dict[str, Any]]] | None:
    """Return a function that measures what the retention gate judges, or None without a gate."""
    config = recipe.retention
    if config is None:
        return None
    task_dir = config.task_dir or recipe.evaluate.task_dir
    assert task_dir is not None
    tokenizer = load_tokenizer(recipe.model.path)
    evaluator = LiveEvaluator(
        config.tasks,
        task_dir,
        tokenizer,
        batch_size=config.batch_size,
        seed=recipe.run.seed,
        max_rows=config.max_rows,
        allow_code=recipe.evaluate.allow_code,
        max_length=model_length(read_model_config(recipe.model.path)),
    )
    collective = ProcessGroupCollective()

    def measure(engine: ZeroEngine) -> list[dict[str, Any]]:
        return [item.to_json() for item in evaluator.evaluate(_LiveModel(engine), collective)]

    return measure


def full_evaluation(recipe: Recipe, model: Path, output: Path, world: World, log: RunLog) -> None:
    """Measure the recipe's tasks on a model folder; see ``measure_folder``."""
    config, seed = recipe.evaluate, recipe.run.seed
    measure_folder(config, model, output, seed, world, log, recipe_dict(recipe))


def measure_folder(
    config: EvaluateConfig,
    model: Path,
    output: Path,
    seed: int,
    world: World,
    log: RunLog,
    recipe: Mapping[str, Any] | None = None,
) -> None:
    """Measure all tasks on a model folder, unless ``output`` holds that measurement already.

    Collective: every rank must call it. Each rank loads a whole copy of the model.
    """
    assert config.task_dir is not None
    collective = ProcessGroupCollective()
    known = collective.rank == 0 and results_match(
        output, model, config.tasks, config.task_dir, config.max_new_tokens, seed
    )
    if collective.gather_objects(known)[0]:
        log(f"evaluation in {output} is up to date")
        return
    evaluate_model(
        model,
        list(config.tasks),
        config.task_dir,
        output,
        collective=collective,
        batch_size=config.batch_size,
        max_new_tokens=config.max_new_tokens,
        seed=seed,
        options=EvaluationOptions(allow_code=config.allow_code),
        recipe=recipe,
        replace=True,
        log_path=log.path,
        log=log,
        before_call=lambda: world.stop_if_asked("during evaluation"),
    )
    log(f"evaluated {model} -> {output}")


def _write_report(output: Path, log: RunLog) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        log("no report.html: matplotlib is not installed (pip install 'forgetscale[report]')")
        return
    log(f"report: {build_report([output], output)}")


def watch(recipe: Recipe, world: World) -> None:
    """Let the run end with a report if it hangs, as the recipe says."""
    if recipe.train.watchdog_s is not None:
        world.watchdog.watch(
            recipe.run.output_dir,
            rank=world.rank,
            size=world.size,
            limit_seconds=recipe.train.watchdog_s,
            # The log of the run, whichever rank reports first.
            log_path=recipe.run.output_dir / "log.txt",
        )


def run(options: argparse.Namespace) -> None:
    """Run the command. Collective: every rank must call it."""
    recipe = read_recipe(options)
    check_run_folder(recipe)
    output = recipe.run.output_dir
    method = METHODS[recipe.method.kind](recipe.method)
    with running_world(output) as (world, log):
        if recipe.model.trust_remote_code:
            trust_code(recipe.model.path, log)
        world.on_main(lambda: check_inputs(recipe))
        world.on_main(lambda: open_run_folder(recipe))
        watch(recipe, world)
        log(f"run {recipe.run.name}: {recipe.method.kind} on {world.size} ranks -> {output}")
        if recipe.evaluate.tasks:
            before = output / "results" / "source"
            full_evaluation(recipe, recipe.model.path, before, world, log)
        train(
            recipe,
            method,
            world,
            log,
            live_evaluation(recipe),
            refusal_probe(recipe),
            retention_measures(recipe),
        )
        if recipe.evaluate.tasks:
            if recipe.model.trust_remote_code:
                trust_code(output / "export", log)  # a copy of the same files
            full_evaluation(recipe, output / "export", output / "results" / "final", world, log)
            world.on_main(lambda: _write_report(output, log))
        log("done")

"""The freeze plan of a run: made from the source model, given by path, or kept from before."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from forgetscale.api import Method
from forgetscale.artifact import (
    read_manifest,
    wait_until_visible,
)
from forgetscale.config import CalibrationConfig, FisherConfig, Recipe, recipe_dict
from forgetscale.data import (
    TokenSet,
    open_data,
    require_same_tokenizer,
)
from forgetscale.engine.adapters import find_adapters
from forgetscale.engine.bases import open_refreshed, settle_basis
from forgetscale.engine.calibration import SourceCalibration
from forgetscale.engine.metrics import RunLog
from forgetscale.engine.start import SourceModel, start_engine
from forgetscale.engine.trial import train_and_subtract
from forgetscale.errors import ConfigError
from forgetscale.masks import FreezePlan, load_plan, save_plan
from forgetscale.progress import Progress
from forgetscale.zero3 import DTYPES, World, ZeroEngine

PLAN_FOLDER = "plan"
PLAN_FIELDS = (
    "score",
    "axis",
    "scope",
    "frozen_fraction",
    "trainable_fraction",
    "trainable_layers",
    "num_trial_steps",
    "trial_lr",
    "variant",
    "ends",
    "vectors",
    "shield_token_ids",
    "shield_rows",
)
"""Fields of ``method`` that a plan was made with and that a run must repeat."""


def _open_set(recipe: Recipe, config: CalibrationConfig) -> TokenSet:
    token_set = TokenSet(config.path)
    require_same_tokenizer(token_set, recipe.model.path)
    return token_set


def calibration_for(
    recipe: Recipe, world: World, source: SourceModel, log: RunLog
) -> SourceCalibration:
    """Return the method's view of source model and source data; builds nothing yet."""
    config = getattr(recipe.method, "calibration", None)
    token_set = None
    if config is not None:
        token_set = _open_set(recipe, config)
    target = open_data(recipe.data)

    def progress(total: int) -> Progress:
        return Progress(total, "calibrate", unit="pass", log_path=log.path, visible=log.visible)

    def trial(num_steps: int, lr: float) -> ZeroEngine:
        engine = start_engine(recipe, world, source, plan=None, training=True)
        read = source.folder.read_flat
        return train_and_subtract(
            engine, recipe, target, read, progress, num_steps=num_steps, lr=lr
        )

    return SourceCalibration(
        structure=source.skeleton,
        seed=recipe.run.seed,
        build=lambda: start_engine(recipe, world, source, plan=None, training=False),
        config=config,
        token_set=token_set,
        target=target,
        world=world,
        model_hash=source.content_hash,
        progress=progress,
        trial=trial,
        peak_lr=recipe.optim.lr,
        read_source=partial(_read_source, source, DTYPES[recipe.model.dtype]),
        open_set=partial(_open_set, recipe),
        build_training=lambda: start_engine(recipe, world, source, plan=None, training=True),
        keep_basis=partial(settle_basis, recipe, world, source.content_hash),
        adapters=find_adapters(recipe, source.skeleton),
        open_refreshed=partial(open_refreshed, recipe, world),
    )


def _read_source(
    source: SourceModel, dtype: torch.dtype, name: str, start: int, length: int
) -> Tensor:
    return source.folder.read_flat(name, start, length, dtype)


def make_plan(
    recipe: Recipe, world: World, source: SourceModel, method: Method, log: RunLog
) -> FreezePlan | None:
    """Let the method make its plan from the source model. Collective: every rank must call it."""
    calibration = calibration_for(recipe, world, source, log)
    try:
        plan = method.prepare(calibration)
    finally:
        calibration.close()
    if plan is not None:
        plan.check_model(source.shapes)
        hashes = set(world.gather_objects(plan.content_hash()))
        assert len(hashes) == 1, "ranks made different plans"
    return plan


def write_plan(directory: Path, plan: FreezePlan, recipe: Recipe, world: World) -> FreezePlan:
    """Write the plan artefact on rank 0; return the plan to go on with on every rank.

    Bits of elements are mapped from the file from then on, not held by every rank.
    Collective: every rank must call it.
    """

    def write() -> str:
        save_plan(directory, plan, recipe_dict(recipe))
        return str(read_manifest(directory)["self_hash"])

    self_hash = world.on_main(write)
    if not plan.elements:
        return plan
    wait_until_visible(directory, self_hash)
    return load_plan(directory)


def settle_plan(
    recipe: Recipe, world: World, source: SourceModel, method: Method, log: RunLog
) -> FreezePlan | None:
    """Return the run's plan: made before, given by path, or made now and kept in the run folder.

    Collective: every rank must call it.

    Raises:
        ConfigError: The plan was made for another model.
    """
    kept = recipe.run.output_dir / PLAN_FOLDER
    given = getattr(recipe.method, "plan", None)
    found = world.broadcast(kept.is_dir())
    if not found and given is None:
        plan = make_plan(recipe, world, source, method, log)
        return None if plan is None else write_plan(kept, plan, recipe, world)
    path = kept if given is None or found else Path(given)
    plan = load_plan(path)
    made_for = plan.provenance.get("model_hash")
    if made_for != source.content_hash:
        raise ConfigError(
            f"freeze plan {path} was made for another model (hash {str(made_for)[:12]}, this model"
            f" has {source.content_hash[:12]}); make the plan again with forgetscale calibrate."
        )
    _check_plan_recipe(path, plan, recipe)
    plan.check_model(source.shapes)
    return plan if found else write_plan(kept, plan, recipe, world)


def _check_plan_recipe(path: Path, plan: FreezePlan, recipe: Recipe) -> None:
    section = recipe_dict(recipe)["method"]
    expected = {"method": section["kind"]}
    for name in PLAN_FIELDS:
        if name in section:
            expected[name] = section[name]
    fisher = section.get("fisher") or asdict(FisherConfig())
    if section.get("score") == "fisher":
        expected["fisher"] = fisher
    drawn = section.get("score") == "rand" or section["kind"] in ("hft", "s2ft")
    if drawn or (section.get("score") == "fisher" and fisher["labels"] == "sampled"):
        expected["seed"] = recipe.run.seed
    for name, wanted in expected.items():
        if (made := plan.provenance.get(name)) != wanted:
            field = {"method": "method.kind", "seed": "run.seed"}.get(name, f"method.{name}")
            raise ConfigError(
                f"freeze plan {path} was made with {field} {made!r}, the recipe says {wanted!r};"
                " change the recipe or make the plan again with forgetscale calibrate."
            )
    counted = plan.provenance.get("target")
    if counted is not None:
        target = open_data(recipe.data).content_hash
        if counted["content_hash"] != target:
            raise ConfigError(
                f"freeze plan {path} was made with another target text"
                f" (content hash {counted['content_hash'][:12]}, the recipe's data have"
                f" {target[:12]}); make the plan again with forgetscale calibrate."
            )

"""A worker from its recipe to the published result. Start it as often as there is hardware for."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forgetscale.artifact import MANIFEST_NAME, read_manifest, recorded_day
from forgetscale.config import GenerateRecipe, generate_recipe_dict
from forgetscale.config.generate import PromptsDialogueConfig, SdftDialogueConfig, SsrDialogueConfig
from forgetscale.data import tokenizer_hash
from forgetscale.errors import DataError, ForgetScaleError
from forgetscale.generation.dialogues import DialogueSettings
from forgetscale.generation.engines.base import Engine
from forgetscale.generation.engines.choice import open_engine
from forgetscale.generation.engines.zero3 import Zero3Engine, Zero3Group
from forgetscale.generation.filters import DialogueFilter
from forgetscale.generation.layout import ChatLayout
from forgetscale.generation.leases import LeaseTable, highest_epochs
from forgetscale.generation.loading import (
    engine_fingerprint,
    load_tokenizer,
    require_model_folder,
    stop_ids,
)
from forgetscale.generation.plan import SamplePlan
from forgetscale.generation.result import KIND, publish, select
from forgetscale.generation.sources import RecipeSource, input_files
from forgetscale.generation.store import RESULT, RUN_FILE, RunStore, read_description, run_key
from forgetscale.generation.worker import Worker, WorkerSettings, require_yield, worker_name
from forgetscale.progress import Progress
from forgetscale.zero3 import ArrivalWatch, World

_PUBLISHING = 999_999
"""Shard number of the lease under which one worker publishes."""
_NOT_TEXT = {
    "": (
        *("output_dir", "lease_seconds", "copy_after_seconds", "journal_rows"),
        "min_accepted_fraction",
    ),
    "engine": ("num_slots", "tensor_parallel_size", "offload", "late_seconds"),
}
"""Fields of ``generate`` that do not change what is written."""


@dataclass(slots=True)
class _Run:
    """Everything a worker needs but the model."""

    recipe: GenerateRecipe
    store: RunStore
    settings: DialogueSettings
    source: RecipeSource
    plan: SamplePlan
    inputs: dict[str, str]


def run_worker(
    recipe: GenerateRecipe,
    *,
    should_stop: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Work on a run until its result is published, by this worker or another one.

    Args:
        recipe: What is generated.
        should_stop: Asked between steps; True ends the worker with its work kept.
        say: Told what happens.

    Returns:
        The payload of the result.

    Raises:
        ConfigError: Recipe, model or folder are not as they must be.
        DataError: Hardly anything is accepted.
        StoppedEarly: ``should_stop`` said so.
    """
    run = prepare(recipe)
    return _work_until_published(
        run, lambda: open_engine(recipe, run.settings.stop_ids), should_stop, say
    )


def run_group(
    recipe: GenerateRecipe, world: World, *, say: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Work as one worker with one model between all ranks (engine ``zero3``).

    Args:
        recipe: What is generated.
        world: This process among all.
        say: Told what happens, on rank 0.

    Returns:
        The payload of the result, on all ranks.

    Raises:
        ConfigError: Recipe, model or folder are not as they must be.
        DataError: Hardly anything is accepted.
        StoppedEarly: A rank was asked to stop.

    Collective: every rank must call it.
    """
    run = _prepare_on_all(recipe, world, world.on_main(lambda: _fingerprint(recipe)))
    result = recipe.generate.output_dir / RESULT
    if world.on_main(lambda: (result / MANIFEST_NAME).exists()):
        return world.on_main(lambda: _payload(run))
    watch = ArrivalWatch(world, recipe.generate.engine.late_seconds)
    failure: ForgetScaleError | None = None
    try:
        group = Zero3Group(recipe, world, run.source.start, watch)
        if world.is_main:
            engine = Zero3Engine(group)
            try:
                _work_until_published(
                    run, lambda: engine, lambda: world.stop.requested or engine.stop_requested, say
                )
            except ForgetScaleError as error:
                failure = error
            engine.dismiss()
        else:
            group.serve()
    finally:
        watch.close()

    def finish() -> dict[str, Any]:
        if failure is not None:
            raise failure
        return _payload(run)

    return world.on_main(finish)


def _prepare_on_all(recipe: GenerateRecipe, world: World, fingerprint: dict[str, Any]) -> _Run:
    error, run = None, None
    try:
        run = prepare(recipe, fingerprint)
    except ForgetScaleError as found:
        error = found
    world.agree(error)
    assert run is not None
    return run


def _fingerprint(recipe: GenerateRecipe) -> dict[str, Any]:
    require_model_folder(recipe.model.path)
    tokenizer = load_tokenizer(recipe.model.path)
    return engine_fingerprint(recipe.model, tokenizer, recipe.generate.engine.kind)


def _work_until_published(
    run: _Run,
    open_model: Callable[[], Engine],
    should_stop: Callable[[], bool],
    say: Callable[[str], None],
) -> dict[str, Any]:
    recipe = run.recipe
    result = recipe.generate.output_dir / RESULT
    engine: Engine | None = None
    name = worker_name()
    while not (result / MANIFEST_NAME).exists():
        shards = set(range(run.plan.num_shards(run.store)))
        if not shards <= run.store.sealed():
            if engine is None:
                say(f"worker {name} loads {recipe.model.path}")
                engine = open_model()
            _work(run, engine, name, should_stop)
        leases = run.store.leases(name, recipe.generate.lease_seconds)
        if not _try_to_publish(run, leases, say):
            time.sleep(min(1.0, recipe.generate.lease_seconds / 10))
    return _payload(run)


def _payload(run: _Run) -> dict[str, Any]:
    """Return what the published result says of itself."""
    result = run.store.directory / RESULT
    payload: dict[str, Any] = read_manifest(result, KIND)["payload"]
    if payload["run_key"] != run.store.key:
        raise DataError(f"{result} belongs to another generation; remove it and start again.")
    return payload


def _work(run: _Run, engine: Engine, name: str, should_stop: Callable[[], bool]) -> None:
    config = run.recipe.generate
    settings = WorkerSettings(
        name,
        lease_seconds=config.lease_seconds,
        journal_rows=config.journal_rows,
        max_attempts=config.max_attempts,
        min_accepted_fraction=0.0 if run.source.num_ids else config.min_accepted_fraction,
        copy_after_seconds=config.copy_after_seconds,
    )
    total = run.plan.total_ids(run.store)
    log_path = run.store.directory / "workers" / f"{name}.log"
    with Progress(total, "generate", unit="id", log_path=log_path, line_seconds=10.0) as progress:
        worker = Worker(
            run.store,
            run.plan,
            run.source,
            engine,
            settings,
            report=lambda done, total, note: progress.update(done, f"{note}, all workers"),
            should_stop=should_stop,
        )
        worker.run()


def prepare(recipe: GenerateRecipe, fingerprint: dict[str, Any] | None = None) -> _Run:
    """Open or make the run's folder and check everything that needs no model.

    Args:
        recipe: What is generated.
        fingerprint: What decides the text beside the recipe; None reads and hashes the model.

    Raises:
        ConfigError: Recipe, model or folder are not as they must be.
    """
    config = recipe.generate
    fingerprint = fingerprint or _fingerprint(recipe)
    tokenizer = load_tokenizer(recipe.model.path)
    inputs = input_files(config)
    day = _template_day(config.output_dir)
    layout = ChatLayout(
        tokenizer,
        turns=getattr(config.dialogue, "turns", 1),
        system=getattr(config.dialogue, "system", None),
        day=day,
    )
    filters = DialogueFilter(config.filters)
    description: dict[str, Any] = {
        "recipe": _text_fields(recipe),
        "inputs": inputs,
        "fingerprint": fingerprint,
        "template_day": day if layout.uses_day else None,
    }
    content = {name: fingerprint[name] for name in ("model", "tokenizer", "template")}
    settings = DialogueSettings(
        layout,
        filters,
        run_key({"recipe": _seeded_fields(description["recipe"]), "inputs": inputs, **content}),
        stop_ids(recipe.model.path, tokenizer),
        config.max_tokens,
        config.soft_targets,
    )
    source = RecipeSource(config, settings)
    description["num_ids"] = source.num_ids
    store = RunStore.open(config.output_dir, description)
    plan = SamplePlan(
        config.shard_size, config.num_dialogues, source.num_ids, config.over_generation
    )
    return _Run(recipe, store, settings, source, plan, inputs | {"model": fingerprint["model"]})


def _text_fields(recipe: GenerateRecipe) -> dict[str, Any]:
    """Return the recipe without what does not change the text; files stand in the inputs."""
    generate = generate_recipe_dict(recipe)["generate"]
    for section, names in _NOT_TEXT.items():
        target = generate[section] if section else generate
        for name in names:
            del target[name]
    generate["filters"].pop("contamination")
    if isinstance(
        recipe.generate.dialogue, PromptsDialogueConfig | SdftDialogueConfig | SsrDialogueConfig
    ):
        generate["dialogue"].pop("path")
    generate["dialogue"].pop("topics", None)
    return dict(generate)


def _seeded_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that seeds hang on: a model in slices draws what a whole one draws."""
    kind = fields["engine"]["kind"]
    return fields | {"engine": {"kind": "transformers" if kind == "zero3" else kind}}


def _template_day(directory: Path) -> str:
    """Return the day that templates take for today: the one on which the run began."""
    if (directory / RUN_FILE).exists():
        return read_description(directory).get("template_day") or recorded_day()
    return recorded_day()


def _try_to_publish(run: _Run, leases: LeaseTable, say: Callable[[str], None]) -> bool:
    """Publish, or add shards, unless another worker is at it; return whether it was done."""
    config, store = run.recipe.generate, run.store
    num_shards = run.plan.num_shards(store)
    if not set(range(num_shards)) <= store.sealed():
        return True
    epochs = highest_epochs(leases.directory)
    lease = leases.acquire(_PUBLISHING, epochs.get(_PUBLISHING, 0))
    if lease is None:
        return False
    try:
        if (store.directory / RESULT / MANIFEST_NAME).exists():
            return True
        selection = select(store, num_shards, config)
        if config.num_dialogues is not None:
            require_yield(selection.counts, config.min_accepted_fraction, store.directory)
            if selection.num_accepted < config.num_dialogues:
                more = run.plan.extend(store, num_shards, selection.num_accepted)
                say(
                    f"{selection.num_accepted} of {config.num_dialogues} dialogues accepted in"
                    f" {num_shards} shards; going on to {more}"
                )
                return True
        publish(
            store,
            num_shards,
            selection,
            recipe=generate_recipe_dict(run.recipe),
            inputs=run.inputs,
            tokenizer_sha256=tokenizer_hash(run.recipe.model.path),
            num_top=config.soft_targets,
        )
        say(f"published {len(selection.ids)} dialogues: {store.directory / RESULT}")
        return True
    finally:
        lease.release()

"""Put a run together: source model, freeze plan, engine, stream, checkpoint; then train."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path

from forgetscale.api import EDITS_START, Method, overrides
from forgetscale.checkpoint import (
    CheckpointStore,
    RunState,
    SaveReport,
    export_adapter,
    export_model,
)
from forgetscale.config import Recipe, recipe_dict
from forgetscale.config.deepspeed import accumulation_steps
from forgetscale.data import (
    TokenStream,
    TrainingData,
    open_data,
    open_stream,
)
from forgetscale.engine.audit import FreezeAudit, audit_export
from forgetscale.engine.data_state import (
    keep_data_record,
    require_same_data,
    settle_run_skips,
)
from forgetscale.engine.extras import keep_reference_record, open_extras
from forgetscale.engine.guard import Guard
from forgetscale.engine.ladder import RolledBack, finish_rollback
from forgetscale.engine.ledger import LEDGER_FILE, Ledger
from forgetscale.engine.loop import Evaluate, Probe, Training, train_loop
from forgetscale.engine.metrics import MetricsLog, RunLog
from forgetscale.engine.pace import Pace
from forgetscale.engine.protection import Protection, settle_protection
from forgetscale.engine.refresh import make_refresh
from forgetscale.engine.restoration import Restoration
from forgetscale.engine.retention import RetentionGate
from forgetscale.engine.start import SourceModel, open_source, source_reader, start_engine
from forgetscale.errors import AuditError, CheckpointError, ConfigError
from forgetscale.progress import Progress
from forgetscale.zero3 import DTYPES, World, ZeroEngine

EXPORT_FOLDER = "export"


def adapter_folder(directory: Path) -> Path:
    """Return where the adapter goes that is merged in an export folder."""
    return directory.with_name(f"{directory.name}-adapter")


def num_train_steps(recipe: Recipe, targets_per_row: Fraction | int) -> int:
    """Return the number of optimizer steps, with ``targets_per_row`` target tokens in the mean."""
    if recipe.train.num_steps is not None:
        return recipe.train.num_steps
    assert recipe.train.num_target_tokens is not None
    per_step = recipe.train.global_batch_size * targets_per_row
    return -(-recipe.train.num_target_tokens // per_step)


def _num_steps(recipe: Recipe, data: TrainingData) -> int:
    mask = recipe.data.document_mask
    return num_train_steps(recipe, data.targets_per_row(document_mask=mask))


def train(
    recipe: Recipe,
    method: Method,
    world: World,
    log: RunLog,
    evaluate: Evaluate | None = None,
    probe: Probe | None = None,
    measure_retention: Evaluate | None = None,
) -> RunState:
    """Run a recipe to its end, resuming from the newest good checkpoint if there is one.

    A run that the retention gate or the ladder sends back starts again from that checkpoint, as a
    new start of the command would.

    Args:
        recipe: Resolved recipe; its run folder exists (``open_run_folder``).
        method: The protection.
        world: This process among all.
        log: Log of the run.
        evaluate: Measures the live model, or None.
        probe: Measures the live model for the metrics of a step, or None.
        measure_retention: Measures the tasks of the retention gate, or None.

    Raises:
        RetentionError: More of the source model's abilities is lost than the recipe allows.

    Collective: every rank must call it.
    """
    while True:
        try:
            return _train_once(recipe, method, world, log, evaluate, probe, measure_retention)
        except RolledBack as back:
            log(f"{back}; see {LEDGER_FILE}")


def _train_once(
    recipe: Recipe,
    method: Method,
    world: World,
    log: RunLog,
    evaluate: Evaluate | None,
    probe: Probe | None,
    measure_retention: Evaluate | None,
) -> RunState:
    data, source = open_data(recipe.data, recipe.model.path), open_source(recipe, world)
    kept = settle_protection(recipe, world, source, method, log)
    log(kept.describe(source.shapes))
    engine = _start(recipe, world, source, kept)
    audit = FreezeAudit(engine)
    ledger = Ledger(recipe.run.output_dir, world)
    store = open_store(recipe, world, log, ledger)
    fresh = _finish_roll_back(recipe, world, store, ledger, data, log)
    state = _resume(recipe, world, store, engine, method, kept, data, source, audit, log)
    _begin(recipe, data, method, engine, state, ledger, fresh=fresh)
    num_steps = _num_steps(recipe, data)
    extras = open_extras(recipe, method.loss, data, world, source)
    job = Training(
        recipe=recipe,
        world=world,
        engine=engine,
        method=method,
        stream=_open_stream(recipe, world, data, state, log),
        extras=extras,
        store=store,
        metrics=MetricsLog(recipe.run.output_dir, visible=world.is_main, step=state.step),
        ledger=ledger,
        log=log,
        guard=Guard(recipe.guard, state.guard),
        audit=audit,
        pace=Pace(world, log),
        progress=_progress(num_steps, state, log),
        num_steps=num_steps,
        num_micro_batches=accumulation_steps(recipe, world.size),
        evaluate=evaluate,
        probe=probe,
        refresh=make_refresh(recipe, world, source, method, engine, store, log),
        gate=RetentionGate(recipe.retention, ledger),
        measure_retention=measure_retention,
        state=state,
        restoration=_restoration(recipe, world, source, kept, engine),
    )
    try:
        state = train_loop(job)
    except RolledBack:
        extras.close()
        engine.destroy()
        raise
    finally:
        job.metrics.close()
    extras.close()
    if recipe.train.export:
        folder = recipe.run.output_dir / EXPORT_FOLDER
        export_run(recipe, world, source, kept, engine, state, folder, log)
    engine.destroy()
    return state


def _finish_roll_back(
    recipe: Recipe,
    world: World,
    store: CheckpointStore,
    ledger: Ledger,
    data: TrainingData,
    log: Callable[[str], None],
) -> bool:
    """Do what a start announced that ended before it was done; say if there is no checkpoint."""
    finish_rollback(ledger, store, world, data, recipe.run.output_dir, log)
    undone_to = RetentionGate(recipe.retention, ledger).state.undone_to
    if undone_to is not None:
        store.remove_after(undone_to)
    return not world.broadcast(store.steps())


def _start(recipe: Recipe, world: World, source: SourceModel, kept: Protection) -> ZeroEngine:
    return start_engine(
        recipe, world, source, plan=kept.plan, training=True, adapters=kept.adapters
    )


def _restoration(
    recipe: Recipe, world: World, source: SourceModel, kept: Protection, engine: ZeroEngine
) -> Restoration | None:
    if recipe.restore is None:
        return None
    return Restoration(recipe.restore, engine, source_reader(recipe, world, source, kept.plan))


def _begin(
    recipe: Recipe,
    data: TrainingData,
    method: Method,
    engine: ZeroEngine,
    state: RunState,
    ledger: Ledger,
    *,
    fresh: bool,
) -> None:
    if fresh and overrides(method, EDITS_START):
        method.start(engine.shards)
        engine.shards.write_params()
    event = "resumed" if state.step else "started"
    ledger.note(event, step=state.step, cursor=state.cursor, ranks=engine.world.size)
    engine.world.on_main(lambda: _keep_records(recipe, data))


def _open_stream(
    recipe: Recipe, world: World, data: TrainingData, state: RunState, log: Callable[[str], None]
) -> TokenStream:
    return open_stream(
        data,
        seed=recipe.data.shuffle_seed,
        global_batch_size=recipe.train.global_batch_size,
        rank=world.rank,
        world_size=world.size,
        cursor=state.cursor,
        skips=settle_run_skips(recipe, world, data, state, log),
        documents=recipe.data.document_mask,
    )


def _progress(num_steps: int, state: RunState, log: RunLog) -> Progress:
    return Progress(num_steps, "train", done=state.step, log_path=log.path, visible=log.visible)


def _keep_records(recipe: Recipe, data: TrainingData) -> None:
    keep_data_record(recipe.run.output_dir, data)
    keep_reference_record(recipe)


def _resume(
    recipe: Recipe,
    world: World,
    store: CheckpointStore,
    engine: ZeroEngine,
    method: Method,
    kept: Protection,
    data: TrainingData,
    source: SourceModel,
    audit: FreezeAudit,
    log: Callable[[str], None],
) -> RunState:
    fresh = RunState(
        step=0,
        cursor=0,
        target_tokens=0,
        world_size=world.size,
        data_hash=data.content_hash,
        plan_hash=kept.plan_hash(),
        model_hash=source.content_hash,
    )
    store.sweep()
    found = store.find()
    if found is None:
        return fresh
    require_same_data(store.path(found.step), found.data_hash, recipe.run.output_dir, data)
    for field, what in (
        ("plan_hash", "freeze plan"),
        ("model_hash", "source model (model.path)"),
    ):
        if getattr(found, field) != getattr(fresh, field):
            raise ConfigError(
                f"{store.path(found.step)} was made with another {what}; put the old one back or"
                " start a new run.output_dir."
            )
    method.load_state_dict(store.load(found, engine, kept.plan))
    audit.check(found.step)
    log(f"resumed from {store.path(found.step)}")
    return replace(found, world_size=world.size)


def export_checkpoint(
    recipe: Recipe, method: Method, world: World, log: RunLog, directory: Path
) -> None:
    """Load the newest good checkpoint of a run and export it.

    Collective: every rank must call it.

    Raises:
        CheckpointError: The run has no good checkpoint.
    """
    output = recipe.run.output_dir
    data = open_data(recipe.data)
    source = open_source(recipe, world)
    kept = settle_protection(recipe, world, source, method, log)
    engine = _start(recipe, world, source, kept)
    audit = FreezeAudit(engine)
    store = open_store(recipe, world, log)
    state = _resume(recipe, world, store, engine, method, kept, data, source, audit, log)
    if state.step == 0:
        raise CheckpointError(f"{output}/checkpoints holds no good checkpoint; train first.")
    export_run(recipe, world, source, kept, engine, state, directory, log)
    engine.destroy()


def open_store(
    recipe: Recipe, world: World, log: RunLog, ledger: Ledger | None = None
) -> CheckpointStore:
    """Return the checkpoint folder of a run; what is saved goes into its ledger."""

    def note(report: SaveReport) -> None:
        if ledger is not None:
            ledger.note("saved", **asdict(report))

    return CheckpointStore(
        recipe.run.output_dir / "checkpoints",
        world,
        keep=recipe.train.keep_checkpoints,
        recipe=recipe_dict(recipe),
        log=log,
        background=recipe.train.checkpoint_mode == "async",
        note=note,
    )


def export_run(
    recipe: Recipe,
    world: World,
    source: SourceModel,
    kept: Protection,
    engine: ZeroEngine,
    state: RunState,
    directory: Path,
    log: Callable[[str], None],
) -> None:
    """Export the model and audit the result; an adapter is merged, and written beside it too.

    Collective: every rank must call it.

    Raises:
        AuditError: A frozen element differs; the export is set aside under another name.
    """
    dtype = DTYPES[recipe.model.dtype]
    payload = {"step": state.step, "plan_hash": state.plan_hash, "model_hash": state.model_hash}
    if recipe.adapter is not None:
        beside = adapter_folder(directory)
        export_adapter(engine, recipe=recipe, directory=beside, payload=payload)
        log(f"exported {beside} ({len(kept.adapters)} factor pairs)")
        if not recipe.adapter.merge:
            return
    export_model(
        engine,
        source=recipe.model.path,
        directory=directory,
        world=world,
        dtype=dtype,
        recipe=recipe_dict(recipe),
        payload=payload,
    )
    count = 0
    fixed = kept.unmerged()
    if fixed is not None:
        try:
            count = audit_export(fixed, source.folder, directory, world, dtype)
        except AuditError:
            aside = directory.with_name(f"{directory.name}.bad-{secrets.token_hex(4)}")
            world.on_main(lambda: str(directory.rename(aside)))
            raise
    log(f"exported {directory}; freeze audit compared {count} tensors with the source")

"""Put a run together: source model, freeze plan, engine, stream, checkpoint; then train."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import asdict, dataclass
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from forgetscale.api import Method
from forgetscale.artifact import (
    canonical_json,
    hash_bytes,
    hash_file,
    read_manifest,
    wait_until_visible,
)
from forgetscale.checkpoint import CheckpointStore, RunState, export_model
from forgetscale.config import FisherConfig, Recipe, recipe_dict
from forgetscale.config.deepspeed import accumulation_steps, engine_config
from forgetscale.data import (
    TokenSet,
    TrainingData,
    open_data,
    open_stream,
    require_same_tokenizer,
)
from forgetscale.engine.audit import FreezeAudit, audit_export
from forgetscale.engine.calibration import SourceCalibration
from forgetscale.engine.data_state import (
    keep_data_record,
    require_same_data,
    settle_run_skips,
)
from forgetscale.engine.loop import Evaluate, Training, train_loop
from forgetscale.engine.metrics import MetricsLog, RunLog
from forgetscale.engine.stop import StopRequest
from forgetscale.errors import AuditError, CheckpointError, ConfigError
from forgetscale.masks import CompactLayout, FreezePlan, load_plan, save_plan
from forgetscale.models import (
    CausalLMWithLoss,
    SafetensorsFolder,
    buffer_values,
    build_skeleton,
    check_document_mask,
    check_head,
    construct,
    layout_for,
    make_compact,
    parameter_shapes,
    read_model_config,
    restore_buffers,
)
from forgetscale.models.causal import HEAD_CHECK_POSITIONS
from forgetscale.progress import Progress
from forgetscale.zero3 import DTYPES, World, ZeroEngine, build_engine, construct_partitioned

PLAN_FOLDER = "plan"
EXPORT_FOLDER = "export"
PLAN_FIELDS = (
    "score",
    "axis",
    "scope",
    "frozen_fraction",
    "vectors",
    "shield_token_ids",
    "shield_rows",
)
"""Fields of ``method`` that a plan was made with and that a run must repeat."""


@dataclass(frozen=True, slots=True)
class SourceModel:
    """The source model: on disk, as a skeleton, and by hash."""

    folder: SafetensorsFolder
    config: Any
    skeleton: Any
    shapes: dict[str, tuple[int, ...]]
    content_hash: str


def open_source(recipe: Recipe, world: World) -> SourceModel:
    """Read the source model's configuration, check its weights and hash them.

    Ranks share the hashing file by file. Collective: every rank must call it.

    Raises:
        DataError: The folder is no model folder, or its weights do not fit its configuration.
    """
    path = recipe.model.path
    config = read_model_config(path, recipe.model.attn_implementation)
    folder = SafetensorsFolder(path)
    skeleton = build_skeleton(config)
    shapes = parameter_shapes(skeleton)
    folder.check_shapes(shapes)
    mine = {
        name: folder.hash_weight_file(name) for name in folder.files()[world.rank :: world.size]
    }
    digests = {k: v for part in world.gather_objects(mine) for k, v in part.items()}
    digests["config.json"] = hash_file(path / "config.json")
    return SourceModel(folder, config, skeleton, shapes, hash_bytes(canonical_json(digests)))


def plan_layout(recipe: Recipe, skeleton: Any, plan: FreezePlan | None) -> CompactLayout | None:
    """Return how the plan is stored: cut matrices, or masks alone; None without a plan."""
    if plan is None:
        return None
    if getattr(recipe.method, "layout", "masked") == "compact":
        return layout_for(plan, skeleton)
    return CompactLayout({}, plan)


def start_engine(
    recipe: Recipe,
    world: World,
    source: SourceModel,
    *,
    plan: FreezePlan | None,
    training: bool,
) -> ZeroEngine:
    """Build the partitioned model, load this rank's slices, check the output head.

    Collective: every rank must call it.
    """
    config = engine_config(recipe, world.size)
    dtype = DTYPES[recipe.model.dtype]
    layout = plan_layout(recipe, source.skeleton, plan)

    def build() -> Any:
        model = construct(source.config)
        if layout is not None:
            make_compact(model, layout)
        return model

    model: Any = construct_partitioned(build, config, dtype)
    if recipe.model.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})

    def read(name: str, start: int, length: int, kind: torch.dtype) -> Tensor:
        if layout is not None and name in layout.pieces:
            piece = layout.pieces[name]
            return piece.take_slice(source.folder.mapped(piece.matrix), start, length).to(kind)
        return source.folder.read_flat(name, start, length, kind)

    engine = build_engine(
        CausalLMWithLoss(model, recipe.train.loss_chunk_size),
        prefix=CausalLMWithLoss.PREFIX,
        read=read,
        world=world,
        config=config,
        layout=layout,
        optim=recipe.optim if training else None,
    )
    restore_buffers(engine.module, buffer_values(source.skeleton), CausalLMWithLoss.PREFIX)
    _check_output_head(engine, source.config.vocab_size)
    if recipe.data.document_mask:
        _check_document_mask(engine, source.config.vocab_size)
    return engine


@torch.no_grad()
def _check_output_head(engine: ZeroEngine, vocab_size: int) -> None:
    ids = torch.arange(1, HEAD_CHECK_POSITIONS + 1, device=engine.world.device)[None] % vocab_size
    engine.set_training(False)
    scores = engine(ids, labels=ids, mode="score")
    check_head(scores, engine(ids, mode="logits"), ids)


def _check_document_mask(engine: ZeroEngine, vocab_size: int) -> None:
    def score(ids: Tensor, positions: Tensor | None) -> Tensor:
        nll: Tensor = engine(ids, labels=ids, mode="score", position_ids=positions)[0]
        return nll

    engine.set_training(False)
    check_document_mask(score, vocab_size, engine.world.device)


def calibration_for(
    recipe: Recipe, world: World, source: SourceModel, log: RunLog
) -> SourceCalibration:
    """Return the method's view of source model and source data; builds nothing yet."""
    config = getattr(recipe.method, "calibration", None)
    token_set = None
    if config is not None:
        token_set = TokenSet(config.path)
        require_same_tokenizer(token_set, recipe.model.path)
    return SourceCalibration(
        structure=source.skeleton,
        seed=recipe.run.seed,
        build=lambda: start_engine(recipe, world, source, plan=None, training=False),
        config=config,
        token_set=token_set,
        target=open_data(recipe.data),
        world=world,
        model_hash=source.content_hash,
        progress=lambda total: Progress(
            total, "calibrate", unit="pass", log_path=log.path, visible=log.visible
        ),
    )


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
    drawn = section.get("score") == "rand" or section["kind"] == "hft"
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
                f"freeze plan {path} shields the rows that another target text does not use"
                f" (content hash {counted['content_hash'][:12]}, the recipe's data have"
                f" {target[:12]}); make the plan again with forgetscale calibrate."
            )


def num_train_steps(recipe: Recipe, targets_per_row: Fraction | int) -> int:
    """Return the number of optimizer steps, with ``targets_per_row`` target tokens in the mean."""
    if recipe.train.num_steps is not None:
        return recipe.train.num_steps
    assert recipe.train.num_target_tokens is not None
    per_step = recipe.train.global_batch_size * targets_per_row
    return -(-recipe.train.num_target_tokens // per_step)


def _describe(plan: FreezePlan | None, source: SourceModel) -> str:
    total = sum(torch.Size(shape).numel() for shape in source.shapes.values())
    if plan is None:
        return f"model: {total:,} parameters, all trained"
    frozen = plan.num_frozen(source.shapes)
    return f"model: {total:,} parameters, {frozen:,} frozen ({frozen / total:.1%})"


def train(
    recipe: Recipe,
    method: Method,
    world: World,
    log: RunLog,
    stop: StopRequest,
    evaluate: Evaluate | None = None,
) -> RunState:
    """Run a recipe to its end, resuming from the newest good checkpoint if there is one.

    Args:
        recipe: Resolved recipe; its run folder exists (``open_run_folder``).
        method: The protection.
        world: This process among all.
        log: Log of the run.
        stop: Knows whether this process was asked to stop.
        evaluate: Measures the live model, or None.

    Collective: every rank must call it.
    """
    data = open_data(recipe.data, recipe.model.path)
    source = open_source(recipe, world)
    plan = settle_plan(recipe, world, source, method, log)
    log(_describe(plan, source))
    engine = start_engine(recipe, world, source, plan=plan, training=True)
    audit = FreezeAudit(engine)
    output = recipe.run.output_dir
    store = open_store(recipe, world, log)
    state = _resume(recipe, world, store, engine, method, plan, data, source, audit, log)
    world.on_main(lambda: keep_data_record(output, data))
    mask = recipe.data.document_mask
    num_steps = num_train_steps(recipe, data.targets_per_row(document_mask=mask))
    stream = open_stream(
        data,
        seed=recipe.data.shuffle_seed,
        global_batch_size=recipe.train.global_batch_size,
        rank=world.rank,
        world_size=world.size,
        cursor=state.cursor,
        skips=settle_run_skips(recipe, world, data, state, log),
        documents=mask,
    )
    metrics = MetricsLog(output, visible=world.is_main, step=state.step)
    progress = Progress(
        num_steps, "train", done=state.step, log_path=log.path, visible=world.is_main
    )
    job = Training(
        recipe=recipe,
        world=world,
        engine=engine,
        method=method,
        stream=stream,
        store=store,
        metrics=metrics,
        audit=audit,
        progress=progress,
        stop=stop,
        num_steps=num_steps,
        num_micro_batches=accumulation_steps(recipe, world.size),
        evaluate=evaluate,
        state=state,
    )
    try:
        state = train_loop(job)
    finally:
        metrics.close()
    if recipe.train.export:
        export_run(recipe, world, source, plan, engine, state, output / EXPORT_FOLDER, log)
    engine.destroy()
    return state


def _resume(
    recipe: Recipe,
    world: World,
    store: CheckpointStore,
    engine: ZeroEngine,
    method: Method,
    plan: FreezePlan | None,
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
        plan_hash=None if plan is None else plan.content_hash(),
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
    method.load_state_dict(store.load(found, engine, plan))
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
    plan = settle_plan(recipe, world, source, method, log)
    engine = start_engine(recipe, world, source, plan=plan, training=True)
    audit = FreezeAudit(engine)
    store = open_store(recipe, world, log)
    state = _resume(recipe, world, store, engine, method, plan, data, source, audit, log)
    if state.step == 0:
        raise CheckpointError(f"{output}/checkpoints holds no good checkpoint; train first.")
    export_run(recipe, world, source, plan, engine, state, directory, log)
    engine.destroy()


def open_store(recipe: Recipe, world: World, log: RunLog) -> CheckpointStore:
    """Return the checkpoint folder of a run."""
    return CheckpointStore(
        recipe.run.output_dir / "checkpoints",
        world,
        keep=recipe.train.keep_checkpoints,
        recipe=recipe_dict(recipe),
        log=log,
    )


def export_run(
    recipe: Recipe,
    world: World,
    source: SourceModel,
    plan: FreezePlan | None,
    engine: ZeroEngine,
    state: RunState,
    directory: Path,
    log: Callable[[str], None],
) -> None:
    """Export the model and audit the result. Collective: every rank must call it.

    Raises:
        AuditError: A frozen element differs; the export is set aside under another name.
    """
    dtype = DTYPES[recipe.model.dtype]
    export_model(
        engine,
        source=recipe.model.path,
        directory=directory,
        world=world,
        dtype=dtype,
        recipe=recipe_dict(recipe),
        payload={"step": state.step, "plan_hash": state.plan_hash, "model_hash": state.model_hash},
    )
    count = 0
    if plan is not None:
        try:
            count = audit_export(plan, source.folder, directory, world, dtype)
        except AuditError:
            aside = directory.with_name(f"{directory.name}.bad-{secrets.token_hex(4)}")
            world.on_main(lambda: str(directory.rename(aside)))
            raise
    log(f"exported {directory}; freeze audit compared {count} tensors with the source")

"""From a recipe to a partitioned model: source model, layout of the plan, engine, its checks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from forgetscale.artifact import (
    canonical_json,
    hash_bytes,
    hash_file,
)
from forgetscale.config import Recipe
from forgetscale.config.deepspeed import engine_config
from forgetscale.masks import AdapterPair, CompactLayout, FreezePlan
from forgetscale.models import (
    CausalLMWithLoss,
    SafetensorsFolder,
    buffer_values,
    build_skeleton,
    check_document_mask,
    check_head,
    construct,
    enable_checkpointing,
    initial_values,
    layout_for,
    make_adapters,
    make_compact,
    parameter_shapes,
    read_model_config,
    restore_buffers,
)
from forgetscale.models.causal import HEAD_CHECK_POSITIONS
from forgetscale.zero3 import (
    DTYPES,
    ReadSlice,
    World,
    ZeroEngine,
    build_engine,
    construct_partitioned,
)


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
    mine = {}
    for name in folder.files()[world.rank :: world.size]:
        world.watchdog.alive("reading the source model")
        mine[name] = folder.hash_weight_file(name)
    digests = {k: v for part in world.gather_objects(mine) for k, v in part.items()}
    digests["config.json"] = hash_file(path / "config.json")
    return SourceModel(folder, config, skeleton, shapes, hash_bytes(canonical_json(digests)))


def plan_layout(
    recipe: Recipe,
    skeleton: Any,
    plan: FreezePlan | None,
    adapters: Mapping[str, AdapterPair] | None = None,
) -> CompactLayout | None:
    """Return how the plan is stored: cut matrices, factors, or masks alone; None without a plan."""
    if plan is None:
        return None
    if adapters:
        return CompactLayout({}, plan, adapters)
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
    adapters: Mapping[str, AdapterPair] | None = None,
    read: ReadSlice | None = None,
) -> ZeroEngine:
    """Build the partitioned model, load this rank's slices, check the output head.

    Args:
        recipe: Resolved recipe.
        world: This process among all.
        source: Source model.
        plan: What may not change, or None.
        training: Whether there is an optimizer.
        adapters: Factors beside the weights, from ``find_adapters``; then the plan holds every
            parameter of the source model whole.
        read: Gives slices of parameters; None reads the source model's.

    Collective: every rank must call it.
    """
    config = engine_config(recipe, world.size)
    dtype = DTYPES[recipe.model.dtype]
    layout = plan_layout(recipe, source.skeleton, plan, adapters)
    read = read or _reader(recipe, world, source, layout)

    def build() -> Any:
        model = construct(source.config)
        if layout is not None:
            make_compact(model, layout)
            make_adapters(model, layout.adapters)
        return model

    model: Any = construct_partitioned(build, config, dtype)
    if recipe.model.activation_checkpointing:
        enable_checkpointing(model)

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


def source_reader(
    recipe: Recipe, world: World, source: SourceModel, plan: FreezePlan | None
) -> ReadSlice:
    """Return what reads slices of source weights by the names the engine uses, cut ones too."""
    return _reader(recipe, world, source, plan_layout(recipe, source.skeleton, plan))


def _reader(
    recipe: Recipe, world: World, source: SourceModel, layout: CompactLayout | None
) -> ReadSlice:
    """Return what gives slices of parameters: parts of the source's, or first values of factors."""
    pieces = {} if layout is None else layout.pieces
    pairs = {} if layout is None else layout.adapters
    pair_of = {name: pair for pair in pairs.values() for name in pair.factor_shapes()}

    def read(name: str, start: int, length: int, kind: torch.dtype) -> Tensor:
        world.watchdog.alive("reading the source model")
        if name in pieces:
            piece = pieces[name]
            return piece.take_slice(source.folder.mapped(piece.matrix), start, length).to(kind)
        if name in pair_of:
            assert recipe.adapter is not None
            seed, init = recipe.run.seed, recipe.adapter.init
            pair = pair_of[name]
            return initial_values(pair, name, start, length, seed=seed, init=init).to(kind)
        return source.folder.read_flat(name, start, length, kind)

    return read


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

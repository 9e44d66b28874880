"""What a run's loss gets at each target beside logits and labels: noise, the source model's view.

Tensors are aligned with labels: what stands at token ``t`` belongs to the prediction of ``t``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from forgetscale.artifact import write_json
from forgetscale.config import Recipe, ReferenceConfig
from forgetscale.data import LogitCache, StreamBatch, TrainingData, tokenizer_hash
from forgetscale.engine.micro_batches import MicroBatch
from forgetscale.engine.start import SourceModel, start_engine
from forgetscale.errors import ConfigError, DataError
from forgetscale.ops import IGNORE_INDEX, anchors
from forgetscale.ops.losses import LossFunction, TokenLoss, loss_needs
from forgetscale.ops.noise import position_noise
from forgetscale.ops.observe import reference_observer
from forgetscale.zero3 import World, ZeroEngine

REFERENCE_FILE = "reference.json"
DEFAULT_TOP_K = 64
COLUMNS = {
    "source_ids": "ids",
    "source_log_probs": "log_probs",
    "source_log_rest": "log_rest",
    "reference_log_prob": "log_prob",
    "old_log_prob": "log_prob",
    "sequence_weight": "text_nll",
}
"""What a loss asks for -> what a cache or the frozen model knows it by."""


class LossExtras:
    """Nothing more, which is what most losses need."""

    def of_rows(self, batch: StreamBatch) -> dict[str, Tensor]:
        """Return ``[rows, T, ...]`` by name for this rank's rows of a step, in host memory."""
        return {}

    def of_micro_batch(self, batch: MicroBatch) -> dict[str, Tensor]:
        """Return ``[B, T, ...]`` by name for rows that are on the device.

        Collective: every rank must call it.
        """
        return {}

    def close(self) -> None:
        """Free what it holds. Collective: every rank must call it."""


class NoiseExtras(LossExtras):
    """One random number per position, for losses that weigh tokens at random.

    Args:
        seed: ``run.seed``.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def of_rows(self, batch: StreamBatch) -> dict[str, Tensor]:
        """Return ``noise``."""
        size = batch.input_ids.shape[1]
        return {"noise": position_noise(self._seed, batch.set_ids, batch.row_ids, size)}


class CachedExtras(LossExtras):
    """What the source model said, read from a logit cache row by row.

    Args:
        cache: Covers all sets of ``data``.
        data: What is trained on.
        needs: Names the loss asks for.
        tau: Temperature of ``sequence_weight`` in nats; None takes the cache's median.
    """

    def __init__(
        self, cache: LogitCache, data: TrainingData, needs: Sequence[str], tau: float | None
    ) -> None:
        hashes = [part.token_set.content_hash for part in data.parts]
        self._set_of_part = torch.tensor([cache.set_hashes.index(name) for name in hashes])
        self._cache = cache
        self._needs = tuple(needs)
        self._tau = cache.median_text_nll if tau is None else tau

    def of_rows(self, batch: StreamBatch) -> dict[str, Tensor]:
        """Return what the loss needs of the source model."""
        sets = self._set_of_part[batch.set_ids].numpy()
        wanted = sorted({COLUMNS[name] for name in self._needs})
        found = self._cache.read(sets, batch.row_ids.numpy(), wanted)
        extra = {name: found[COLUMNS[name]] for name in self._needs}
        if "sequence_weight" in extra:
            extra["sequence_weight"] = (-extra["sequence_weight"] / self._tau).exp()
        return extra


class FrozenExtras(LossExtras):
    """What the source model says, computed at each step by a second ZeRO-3 model.

    Each rank holds its slices of the source weights and nothing else of it.

    Args:
        engine: The source model, for forward passes only.
        needs: Names the loss asks for.
        top_k: Tokens per position.
    """

    def __init__(self, engine: ZeroEngine, needs: Sequence[str], top_k: int) -> None:
        self._engine = engine
        self._needs = tuple(needs)
        # Losses that look at the label alone need no other token.
        self._observer = reference_observer(top_k if "source_ids" in needs else 0)
        engine.set_training(False)

    @torch.no_grad()
    def of_micro_batch(self, batch: MicroBatch) -> dict[str, Tensor]:
        """Return what the loss needs of the source model. Collective: every rank must call it."""
        places = batch.position_ids
        found = self._engine(batch.input_ids, batch.labels, self._observer, position_ids=places)
        targets = batch.labels != IGNORE_INDEX
        targets[:, 0] = False
        extra = {}
        for name in self._needs:
            column = found[COLUMNS[name]]
            extra[name] = column.new_zeros(*targets.shape, *column.shape[1:])
            extra[name][targets] = column
        return extra

    def close(self) -> None:
        """Free the model. Collective: every rank must call it."""
        self._engine.destroy()


def reference_of(recipe: Recipe) -> ReferenceConfig | None:
    """Return the section that says where the source model's predictions come from, if any."""
    found: ReferenceConfig | None = getattr(recipe.method.loss, "reference", None)
    return found


def reference_top_k(recipe: Recipe) -> int:
    """Return how many tokens per position the loss gets of the source model; 1 where none.

    Raises:
        DataError: The cache is missing.
    """
    reference = reference_of(recipe)
    if reference is None:
        return 1
    if reference.cache is not None:
        return LogitCache(reference.cache).top_k
    return reference.top_k or DEFAULT_TOP_K


def check_reference(recipe: Recipe, data: TrainingData, vocab_size: int) -> LogitCache | None:
    """Check what can be checked before the model is built; return the cache, if there is one.

    Args:
        recipe: Resolved recipe.
        data: What is trained on.
        vocab_size: Tokens the model predicts.

    Raises:
        ConfigError: More tokens per position than there are, or documents masked differently.
        DataError: The cache is missing, or was made for other data or another tokenizer.
    """
    reference = reference_of(recipe)
    if reference is None:
        return None
    if reference.cache is None:
        if reference_top_k(recipe) > vocab_size:
            raise ConfigError(
                f"method.loss.reference.top_k is {reference_top_k(recipe)}, but"
                f" {recipe.model.path} has a vocabulary of {vocab_size}; lower it."
            )
        return None
    path = reference.cache
    again = "make it with forgetscale analyze --cache-logits and this recipe"
    if not path.is_dir():
        raise DataError(f"method.loss.reference.cache: {path} does not exist; {again}.")
    cache = LogitCache(path)
    if cache.tokenizer_sha256 != tokenizer_hash(recipe.model.path):
        raise DataError(
            f"logit cache {path} was made with another tokenizer than {recipe.model.path} has;"
            f" {again}."
        )
    for part in data.parts:
        if part.token_set.content_hash not in cache.set_hashes:
            raise DataError(
                f"logit cache {path} was made for other data: it does not cover"
                f" {part.token_set.path} (content hash {part.token_set.content_hash[:12]});"
                f" {again}."
            )
    if cache.document_mask != recipe.data.document_mask:
        raise ConfigError(
            f"logit cache {path} was made with data.document_mask {cache.document_mask}, the recipe"
            f" says {recipe.data.document_mask}; {again}."
        )
    needs = loss_needs(recipe.method.loss.kind)
    if set(anchors.PER_ID) & set(needs) and not cache.top_k:
        raise ConfigError(
            f"method.loss.kind {recipe.method.loss.kind} needs the source model's most likely"
            f" tokens, but logit cache {path} was made with --top-k 0; make it with more."
        )
    return cache


def open_extras(
    recipe: Recipe, loss: LossFunction, data: TrainingData, world: World, source: SourceModel
) -> LossExtras:
    """Return what fills the loss's needs.

    Args:
        recipe: Resolved recipe.
        loss: Loss of its method.
        data: What is trained on.
        world: This process among all.
        source: The source model.

    Raises:
        ConfigError: The cache does not go with the recipe.
        DataError: The cache is missing, or was made for another model, tokenizer or other data.

    Collective: every rank must call it.
    """
    needs = loss.needs if isinstance(loss, TokenLoss) else ()
    if "noise" in needs:
        return NoiseExtras(recipe.run.seed)
    if not needs:
        return LossExtras()
    cache = check_reference(recipe, data, source.config.vocab_size)
    if cache is None:
        engine = start_engine(recipe, world, source, plan=None, training=False)
        return FrozenExtras(engine, needs, reference_top_k(recipe))
    if cache.model_hash != source.content_hash:
        raise DataError(
            f"logit cache {cache.path} was made with another model (hash {cache.model_hash[:12]},"
            f" {recipe.model.path} has {source.content_hash[:12]}); make it with forgetscale"
            " analyze --cache-logits and this recipe."
        )
    return CachedExtras(cache, data, needs, getattr(recipe.method.loss, "tau", None))


def keep_reference_record(recipe: Recipe) -> None:
    """Write down which cache a run looks at, or refuse another one. Call on one process only.

    Raises:
        ConfigError: The run began with a cache of other content.
    """
    reference = reference_of(recipe)
    if reference is None or reference.cache is None:
        return
    found = LogitCache(reference.cache).content_hash
    path: Path = recipe.run.output_dir / REFERENCE_FILE
    if not path.is_file():
        write_json(path, {"content_hash": found})
        return
    if (kept := json.loads(path.read_bytes())["content_hash"]) != found:
        raise ConfigError(
            f"run.output_dir {recipe.run.output_dir} began with another logit cache (content hash"
            f" {kept[:12]}, {reference.cache} has {found[:12]}); put the old one back or start a"
            " new run.output_dir."
        )

"""The source model and source data as methods see them before training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from forgetscale.api import Batch, LabelledBatch, ShardSet
from forgetscale.config import CalibrationConfig
from forgetscale.data import TokenSet, TrainingData, calibration_rows
from forgetscale.engine.labelled import LabelledRows
from forgetscale.errors import ConfigError, DataError
from forgetscale.masks import AdapterPair
from forgetscale.models import CausalLMWithLoss
from forgetscale.ops import IGNORE_INDEX
from forgetscale.ops.documents import packed_labels
from forgetscale.ops.losses import LossFunction
from forgetscale.progress import Progress
from forgetscale.projections.basis import FisherBasis, MeasuredBasis
from forgetscale.zero3 import World, ZeroEngine, ZeroShards

COUNTED_ROWS = 4096
"""Rows of the target text read at a time."""


@dataclass(slots=True)
class SourceCalibration:
    """``Calibration`` over a ZeRO-3 model that is built when first needed.

    Args:
        structure: Skeleton of the model.
        seed: ``run.seed``.
        build: Builds the engine without optimizer. Collective.
        config: Calibration section of the recipe, or None.
        token_set: Its data, or None.
        target: Data that is trained on.
        world: This process among all.
        model_hash: Content hash of the source model.
        progress: Makes the progress display from the number of passes.
        trial: Trains the source model for some steps at a rate; returns the engine, whose masters
            are the changes. Collective.
        peak_lr: ``optim.lr``.
        read_source: Reads elements of source weights, see ``forgetscale.api.Calibration``.
        open_set: Opens a token set of the model's tokenizer.
        build_training: Builds the engine with an optimizer. Collective.
        keep_basis: See ``forgetscale.api.Calibration.settle_basis``. Collective.
        adapters: See ``forgetscale.api.Calibration``.
        open_refreshed: See ``forgetscale.api.Calibration``. Collective.
    """

    structure: nn.Module
    seed: int
    build: Callable[[], ZeroEngine]
    config: CalibrationConfig | None
    token_set: TokenSet | None
    target: TrainingData
    world: World
    model_hash: str
    progress: Callable[[int], Progress]
    trial: Callable[[int, float], ZeroEngine]
    peak_lr: float
    read_source: Callable[[str, int, int], Tensor]
    open_set: Callable[[CalibrationConfig], TokenSet]
    build_training: Callable[[], ZeroEngine]
    keep_basis: Callable[[Path | None, Mapping[str, Any], Callable[[], MeasuredBasis]], FisherBasis]
    adapters: Mapping[str, AdapterPair]
    open_refreshed: Callable[[int, str], FisherBasis]
    _engine: ZeroEngine | None = field(default=None, init=False)
    _used_target: bool = field(default=False, init=False)

    def _live(self) -> ZeroEngine:
        if self._engine is None:
            self._engine = self.build()
            self._engine.set_training(False)
        return self._engine

    def named_modules(self) -> Mapping[str, nn.Module]:
        """Return the live modules by the names they have in the Hugging Face model."""
        module = self._live().module
        assert isinstance(module, CausalLMWithLoss)
        return dict(module.model.named_modules())

    def _source_data(self) -> tuple[CalibrationConfig, TokenSet]:
        if self.config is None or self.token_set is None:
            raise ConfigError(
                "this score needs source data; set method.calibration.path to a token set."
            )
        if self.token_set.is_supervised:
            raise ConfigError(
                f"method.calibration.path: {self.token_set.path} holds SFT rows, but calibration"
                " looks at every token; build it with --chat instead of --sft."
            )
        if self.token_set.num_padding_tokens:
            raise ConfigError(
                f"method.calibration.path: {self.token_set.path} has rows with padding, which would"
                " count as source data; build it with --packing concat."
            )
        return self.config, self.token_set

    @property
    def num_blocks(self) -> int:
        """Return how many rows are used."""
        config, token_set = self._source_data()
        return len(calibration_rows(token_set.num_rows, config.num_blocks))

    def batches(self) -> Iterator[Batch]:
        """Yield batches of ``micro_batch_size`` rows, cut the same way for any rank count.

        Group ``g`` always holds the same rows; ranks take groups in turn. A rank without a group
        in the last turn repeats one with weight 0, so that all make the same number of passes.
        """
        config, token_set = self._source_data()
        size = config.micro_batch_size
        rows = calibration_rows(token_set.num_rows, config.num_blocks)
        groups = [range(len(rows))[first : first + size] for first in range(0, len(rows), size)]
        turns = -(-len(groups) // self.world.size)
        with self.progress(turns) as progress:
            for turn in range(turns):
                self.world.stop_if_asked("during calibration")
                index = turn * self.world.size + self.world.rank
                real = index < len(groups)
                group = list(groups[index if real else 0])
                weight = torch.zeros(size)
                weight[: len(group)] = float(real)
                group += group[-1:] * (size - len(group))
                ids = token_set.read([rows[block] for block in group])
                parts = (ids, weight, torch.tensor(group))
                yield Batch(*(part.to(self.world.device) for part in parts))
                progress.update(turn + 1)

    @torch.no_grad()
    def forward(self, batch: Batch) -> None:
        """Run the decoder body. Collective: every rank must call it."""
        self._live()(batch.input_ids, mode="body")

    @torch.enable_grad()
    def backward(self, batch: Batch, labels: Tensor, loss: LossFunction) -> None:
        """Run the model and carry the gradient of ``loss`` back to every module's output.

        No parameter requires a gradient, so the embedding's output must ask for it. With
        ``model.activation_checkpointing`` only one decoder layer's activations exist at a time, as
        in training; dropout stays off. Collective: every rank must call it.
        """
        engine = self._live()
        module = engine.module
        assert isinstance(module, CausalLMWithLoss)
        with module.input_gradients():
            engine.backward_activations(batch.input_ids, labels=labels, loss=loss)

    def _labelled_data(
        self, source: CalibrationConfig | None
    ) -> tuple[CalibrationConfig, TokenSet]:
        config, token_set = source or self.config, self.token_set
        if config is None:
            raise ConfigError(
                "Fisher information needs source data; set method.calibration.path to a token set,"
                " or method.basis to a finished basis."
            )
        if config is not self.config or token_set is None:
            token_set = self.open_set(config)
        return config, token_set

    def _labelled_rows(self, source: CalibrationConfig | None, sampled: bool) -> LabelledRows:
        config, token_set = self._labelled_data(source)
        return LabelledRows(token_set, config, self.world, seed=self.seed, sampled=sampled)

    @property
    def num_ranks(self) -> int:
        """Return the number of processes."""
        return self.world.size

    def num_rows(self, source: CalibrationConfig | None) -> int:
        """Return how many rows of a source are used."""
        config, token_set = self._labelled_data(source)
        return len(calibration_rows(token_set.num_rows, config.num_blocks))

    def labelled(
        self, source: CalibrationConfig | None, *, sampled: bool
    ) -> Iterator[LabelledBatch]:
        """Yield batches with labels; see ``forgetscale.api.Calibration``."""
        rows = self._labelled_rows(source, sampled)
        with self.progress(len(rows)) as progress:
            done = 0
            for item in rows.passes():
                yield item
                done = min(done + item.batch.weight.shape[0] * self.world.size, len(rows))
                progress.update(done)

    def sample_gradients(
        self, source: CalibrationConfig | None, *, per_sample: int, sampled: bool
    ) -> Iterator[ShardSet]:
        """Yield gradients of samples; see ``forgetscale.api.Calibration``."""
        rows = self._labelled_rows(source, sampled)
        if self._engine is None or not self._engine.shards.trained:
            self.close()
            self._engine = self.build_training()
            self._engine.set_training(False)
        engine = self._engine
        module = engine.module
        assert isinstance(module, CausalLMWithLoss)
        total = -(-len(rows) // per_sample)
        with self.progress(total) as progress:
            for number, sample in enumerate(rows.samples(per_sample), 1):
                with module.input_gradients():
                    for item, last in sample:
                        loss = engine(item.batch.input_ids, item.labels, item.loss)
                        # The mean over ranks that ZeRO-3 takes is undone: a sum is wanted.
                        engine.backward(loss * self.world.size, last=last)
                yield engine.shards
                engine.shards.clear_gradients()
                progress.update(number)

    def settle_basis(
        self,
        given: Path | None,
        settings: Mapping[str, Any],
        measure: Callable[[], MeasuredBasis],
    ) -> FisherBasis:
        """Return the run's Fisher basis; see ``forgetscale.api.Calibration``."""
        return self.keep_basis(given, settings, measure)

    def shards(self) -> ZeroShards:
        """Return this rank's slices of the source weights."""
        return self._live().shards

    def target_token_counts(self) -> Tensor:
        """Count every token of the target text once; ranks share the rows.

        Collective: every rank must call it.

        Raises:
            DataError: A row is damaged, or holds an id the model has no embedding for.
        """
        embedding: Any = self.structure
        size = int(embedding.get_input_embeddings().weight.shape[0])
        counts = torch.zeros(size, dtype=torch.int64)
        error: DataError | None = None
        try:
            for part in self.target.parts:
                counts += self._count_tokens(part.token_set, size)
        except DataError as found:
            error = found
        self.world.agree(error)
        self._used_target = True
        return self.world.sum(counts)

    def _count_tokens(self, token_set: TokenSet, size: int) -> Tensor:
        """Count the tokens in this rank's rows of one set."""
        if token_set.vocab_size > size:
            raise DataError(
                f"{token_set.path} was made with {token_set.vocab_size} token ids, but the"
                f" model embeds {size}; build it with the tokenizer of the model."
            )
        first, last = (
            token_set.num_rows * part // self.world.size
            for part in (self.world.rank, self.world.rank + 1)
        )
        counts = torch.zeros(size, dtype=torch.int64)
        for row in range(first, last, COUNTED_ROWS):
            rows = range(row, min(row + COUNTED_ROWS, last))
            ids = token_set.read(rows)
            if token_set.num_padding_tokens:
                lens = token_set.document_lens(rows)
                ids = ids[packed_labels(ids, lens, document_mask=False) != IGNORE_INDEX]
            counts += torch.bincount(ids.flatten(), minlength=size)
        return counts

    def target_changes(self, num_steps: int, lr: float) -> ZeroShards:
        """Train a copy of the source model on target data; see ``forgetscale.api.Calibration``."""
        self.close()
        self._engine = self.trial(num_steps, lr)
        self._used_target = True
        return self._engine.shards

    def provenance(self) -> Mapping[str, Any]:
        """Return hashes of model, calibration data and, where it was looked at, target text."""
        found: dict[str, Any] = {"model_hash": self.model_hash}
        if self.config is not None and self.token_set is not None:
            found["calibration"] = {
                "content_hash": self.token_set.content_hash,
                "num_blocks": self.config.num_blocks,
                "micro_batch_size": self.config.micro_batch_size,
            }
        if self._used_target:
            found["target"] = {
                "content_hash": self.target.content_hash,
                "num_tokens": self.target.num_tokens,
            }
        return found

    def close(self) -> None:
        """Free the source model, if it was built."""
        if self._engine is not None:
            self._engine.destroy()
            self._engine = None

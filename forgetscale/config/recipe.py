"""The recipe: one frozen dataclass per section, units and ranges beside each field.

Field names are public. A value lives in one place: batch sizes, precision and clipping stand here
and never in the DeepSpeed JSON (see ``forgetscale.config.deepspeed``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import ConfigDict

from forgetscale.config.adapters import ADAPTED_METHODS, REQUIRED_ADAPTERS, AdapterConfig
from forgetscale.config.data import DataConfig
from forgetscale.config.guard import GuardConfig
from forgetscale.config.methods import MethodConfig
from forgetscale.config.ranges import STRICT, require
from forgetscale.config.restoration import RestoreConfig
from forgetscale.config.retention import RetentionConfig
from forgetscale.config.roots import require_roots

NO_CLIPPING = 1e6
"""A ``max_grad_norm`` from here on never clips a run that learns."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """What this run is called and where it writes."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    name: str
    """Short name shown in logs and reports."""
    output_dir: Path
    """Run folder; one folder holds one recipe's run."""
    seed: int = 42
    """Seed of everything random except the data order, >= 0."""
    label: str | None = None
    """What reports call the method of this run; None names its method section."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require(self.seed >= 0, f"seed must be >= 0, got {self.seed}")
        require(self.name != "", "name must not be empty")
        require(self.label != "", "label must not be empty; leave it out to name the method")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The source model: a local Hugging Face folder with safetensors."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    path: Path
    """Folder with ``config.json``, ``*.safetensors`` and the tokenizer."""
    revision: str | None = None
    """Name of the revision the folder holds; recorded, not fetched."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Working precision. Master weights and moments are fp32 either way; fp16 is not offered,
    because its loss scale sits in the gradients the freeze plan edits."""
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention code of ``transformers``."""
    activation_checkpointing: bool = False
    """Recompute each decoder layer in backward instead of keeping its activations."""
    trust_remote_code: bool = False
    """Run the Python files of this model's folder; each is logged with its hash."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """AdamW with decoupled decay; states in fp32."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    lr: float = 5.0e-5
    """Peak learning rate, > 0."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape after warmup; cosine and linear end at 0."""
    warmup_fraction: float = 0.05
    """Share of all steps with rising rate, in [0, 1); rounded up to whole steps."""
    weight_decay: float = 0.01
    """Decoupled decay of matrices, >= 0; 1-D tensors are not decayed."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the two moments, in [0, 1)."""
    eps: float = 1.0e-8
    """Added to the root of the second moment, > 0."""
    max_grad_norm: float = 1.0
    """Clip the norm over trainable elements, > 0."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require(self.lr > 0, f"lr must be > 0, got {self.lr}")
        require(math.isfinite(self.lr), f"lr must be finite, got {self.lr}")
        require(
            0 <= self.warmup_fraction < 1,
            f"warmup_fraction must lie in [0, 1), got {self.warmup_fraction}",
        )
        require(self.weight_decay >= 0, f"weight_decay must be >= 0, got {self.weight_decay}")
        require(
            math.isfinite(self.weight_decay),
            f"weight_decay must be finite, got {self.weight_decay}",
        )
        require(
            all(0 <= beta < 1 for beta in self.betas), f"betas must lie in [0, 1), got {self.betas}"
        )
        require(self.eps > 0, f"eps must be > 0, got {self.eps}")
        require(self.max_grad_norm > 0, f"max_grad_norm must be > 0, got {self.max_grad_norm}")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """How long, in what portions, and what is kept."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    num_target_tokens: int | None = None
    """Stop after the first step that reaches this many target tokens, > 0."""
    num_steps: int | None = None
    """Stop after this many optimizer steps, > 0; give this or ``num_target_tokens``."""
    micro_batch_size: int = 8
    """Sequences per rank and forward pass, > 0."""
    global_batch_size: int = 32
    """Sequences per optimizer step over all ranks, > 0; it need not divide by the rank count."""
    checkpoint_every_steps: int = 500
    """Steps between checkpoints, > 0; the last step always writes one."""
    keep_checkpoints: int = 2
    """Newest verified checkpoints kept, >= 2."""
    checkpoint_mode: Literal["async", "sync"] = "async"
    """``async`` copies the states to host memory and writes beside training; ``sync`` lets training
    wait and takes no memory."""
    audit_every_steps: int = 100
    """Steps between hashes of all frozen elements, > 0."""
    watchdog_s: float | None = 300.0
    """Seconds without progress in a step after which a run that hangs is ended, > 0; saves,
    evaluation and the first step may take four times as long. None watches nothing."""
    accumulation_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type in which gradients of micro-batches are summed."""
    loss_chunk_size: int = 1024
    """Positions whose logits exist at one time, > 0."""
    export: bool = True
    """Write ``export/`` (Hugging Face folder) when training ends."""

    def __post_init__(self) -> None:
        """Check ranges and clashes."""
        require(
            (self.num_target_tokens is None) != (self.num_steps is None),
            "give exactly one of num_target_tokens and num_steps",
        )
        for name in (
            "num_target_tokens",
            "num_steps",
            "micro_batch_size",
            "global_batch_size",
            "checkpoint_every_steps",
            "audit_every_steps",
            "watchdog_s",
            "loss_chunk_size",
        ):
            value = getattr(self, name)
            require(value is None or value > 0, f"{name} must be > 0, got {value}")
        require(
            self.keep_checkpoints >= 2,
            f"keep_checkpoints must be >= 2 (one could be damaged), got {self.keep_checkpoints}",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RefusalProbeConfig:
    """How likely refusals are, by teacher forcing, in the metrics of every few steps."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    every_steps: int = 50
    """Steps between measurements, > 0; the first and the last step are measured too."""
    tasks: tuple[str, ...] = ("refusal",)
    """Tasks of kind ``refusal`` or ``no_refusal`` below ``task_dir``."""
    num_prompts: int = 32
    """Prompts used of each task, > 0; one sequence for each opening of a refusal."""

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("every_steps", "num_prompts"):
            value = getattr(self, name)
            require(value > 0, f"{name} must be > 0, got {value}")
        require(len(self.tasks) > 0, "tasks is empty; name a task or leave refusal_probe out")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """What is measured before, during and after training."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    tasks: tuple[str, ...] = ()
    """Task names, such as ``perplexity/source`` or ``recall``."""
    task_dir: Path | None = None
    """Folder with the tasks."""
    every_steps: int | None = None
    """Steps between measurements on the live model (likelihood tasks only), > 0."""
    batch_size: int = 8
    """Sequences per rank and forward pass, > 0."""
    max_new_tokens: int = 64
    """Longest answer, > 0."""
    live_tasks: tuple[str, ...] | None = None
    """Tasks measured during training; None takes every ``tasks`` entry that needs no generation.
    Tasks of lm-evaluation-harness that generate may be named: a forward call per token."""
    refusal_probe: RefusalProbeConfig | None = None
    """Probability of refusals in ``metrics.jsonl`` and TensorBoard; None measures none."""
    allow_code: tuple[str, ...] = ()
    """Tasks of lm-evaluation-harness whose Python files may be run; others that have any are
    refused."""

    def __post_init__(self) -> None:
        """Check ranges and clashes."""
        require(
            not self.tasks or self.task_dir is not None,
            "tasks need task_dir, the folder they are in",
        )
        require(
            self.refusal_probe is None or self.task_dir is not None,
            "refusal_probe needs task_dir, the folder its tasks are in",
        )
        for name in ("every_steps", "batch_size", "max_new_tokens"):
            value = getattr(self, name)
            require(value is None or value > 0, f"{name} must be > 0, got {value}")
        require(self.every_steps is None or bool(self.tasks), "every_steps needs tasks to measure")
        require(
            self.live_tasks is None or self.every_steps is not None,
            "live_tasks need every_steps, how often they are measured",
        )
        unknown = [name for name in self.live_tasks or () if name not in self.tasks]
        require(not unknown, f"live_tasks names {unknown[:1]}, which tasks does not")
        unknown = [name for name in self.allow_code if name not in self.tasks]
        require(not unknown, f"allow_code names {unknown[:1]}, which tasks does not")


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """One complete run."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    run: RunConfig
    model: ModelConfig
    data: DataConfig
    method: MethodConfig
    train: TrainConfig
    deepspeed: Path
    """DeepSpeed JSON: only what DeepSpeed alone knows."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    adapter: AdapterConfig | None = None
    """Low-rank factors that are trained in place of the weights; None trains the weights."""
    retention: RetentionConfig | None = None
    """What of the source model's abilities may be lost; None measures without a gate."""
    roots: tuple[Path, ...] = ()
    """Folders that every path of the recipe must lie in, links resolved; none allows all."""
    restore: RestoreConfig | None = None
    """Puts source values back into part of the weights while training; None never does."""

    def __post_init__(self) -> None:
        """Check clashes between sections."""
        train, evaluate = self.train, self.evaluate
        require(
            self.model.dtype == "bfloat16" or train.accumulation_dtype == "float32",
            "train.accumulation_dtype must be float32 where model.dtype is float32",
        )
        require(
            self.method.kind != "gmt_official" or self.optim.max_grad_norm >= NO_CLIPPING,
            "method.kind gmt_official is trained without clipping, as published: set"
            f" optim.max_grad_norm to {NO_CLIPPING:.0e} or more, got {self.optim.max_grad_norm}",
        )
        require(
            self.adapter is None or self.method.kind in ADAPTED_METHODS,
            f"adapter: method.kind {self.method.kind} chooses which weights stay, and with an"
            " adapter all of them do; columns, rows and elements of its factors mean nothing by"
            f" themselves. Set method.kind to {' or '.join(ADAPTED_METHODS)}, or remove adapter",
        )
        self._check_adapter()
        require_roots(self, self.roots, "roots")
        require(
            self.retention is None
            or self.retention.task_dir is not None
            or evaluate.task_dir is not None,
            "retention needs task_dir, the folder its tasks are in (or evaluate.task_dir)",
        )
        require(
            self.restore is None or self.adapter is None,
            "restore puts source weights back, and with an adapter they never move; remove one",
        )
        require(
            not evaluate.tasks or self.adapter is None or self.adapter.merge,
            "evaluate.tasks are measured on the merged export, so adapter.merge must be true",
        )
        require(
            not evaluate.tasks or train.export,
            "evaluate.tasks are measured on the export, so train.export must be true",
        )

    def _check_adapter(self) -> None:
        kinds = REQUIRED_ADAPTERS.get(self.method.kind, ())
        found = None if self.adapter is None else self.adapter.kind
        require(
            not kinds or found in kinds,
            f"method.kind {self.method.kind} works on the factors of an adapter: set adapter.kind"
            f" to {' or '.join(kinds)}, got {'no adapter' if found is None else found}",
        )
        if self.method.kind != "adalora" or self.adapter is None:
            return
        require(
            self.method.target_rank <= self.adapter.rank,
            f"method.target_rank is {self.method.target_rank}, but adapter.rank, from which ranks"
            f" shrink, is {self.adapter.rank}",
        )
        steps = self.train.num_steps
        require(
            steps is None or self.method.shrink_until_step < steps,
            f"method.shrink_until_step is {self.method.shrink_until_step}, so no step of"
            f" train.num_steps {steps} would follow at the final ranks; lower it",
        )

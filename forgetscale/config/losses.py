"""Recipe sections of the losses: one frozen dataclass each, told apart by ``kind``.

Any loss goes with any protection (``method: {kind: ssu, loss: {kind: eaft}}``). Losses that look at
a reference model say where its predictions come from (``reference``). The divergence alone (``kl``)
is a function in ``forgetscale.ops.losses`` only: a run that starts at the source would not move.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Discriminator

from forgetscale.config.ranges import STRICT, require
from forgetscale.errors import ConfigError

SHORTHANDS = ("eaft",)
"""Losses that may stand as ``method.kind``: plain training with that loss."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CrossEntropyLossConfig:
    """Negative log-likelihood of the next token."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    kind: Literal["cross_entropy"] = "cross_entropy"
    label_smoothing: float = 0.0
    """Share of the target spread evenly over the vocabulary, in [0, 1)."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require(
            0 <= self.label_smoothing < 1,
            f"label_smoothing must lie in [0, 1), got {self.label_smoothing}",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class EaftLossConfig:
    """Entropy-adaptive fine-tuning: tokens the model is sure about count little."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    kind: Literal["eaft"]
    alpha: float = 1.0
    """Power on the normalised entropy, >= 0; 0 is cross-entropy. ``gate: power`` only."""
    top_k: int = 20
    """Largest logits the entropy is taken over, >= 2 and at most the vocabulary."""
    divisor: float | str = "ln_k"
    """What the entropy is divided by: ``ln_k``, its largest value, or a number of nats > 0; the
    published code has 3.0 for ``top_k: 20``."""
    gate: Literal["power", "sigmoid", "hard"] = "power"
    """Form of the weight."""
    slope: float = 30.0
    """Steepness of ``gate: sigmoid``, > 0."""
    threshold: float = 0.17
    """Normalised entropy at which ``sigmoid`` is one half and ``hard`` begins to count tokens."""
    normalize: Literal["tokens", "weights"] = "tokens"
    """What a step's sum is divided by: its target tokens, as published, or the sum of weights."""

    def __post_init__(self) -> None:
        """Check ranges and clashes."""
        require(self.alpha >= 0, f"alpha must be >= 0, got {self.alpha}")
        require(self.top_k >= 2, f"top_k must be >= 2, got {self.top_k}")
        require(self.slope > 0, f"slope must be > 0, got {self.slope}")
        number = isinstance(self.divisor, int | float) and self.divisor > 0
        require(
            number or self.divisor == "ln_k",
            f"divisor must be ln_k or a number > 0, got {self.divisor!r}",
        )
        require(
            self.gate == "power" or self.alpha == 1,
            f"alpha is for gate power, but gate is {self.gate}",
        )
        require(
            self.gate == "sigmoid" or self.slope == 30.0,
            f"slope is for gate sigmoid, but gate is {self.gate}",
        )
        require(
            self.gate != "power" or self.threshold == 0.17,
            "threshold is for gate sigmoid or hard, but gate is power",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class DftLossConfig:
    """Dynamic fine-tuning: cross-entropy times the label's probability."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    kind: Literal["dft"]


@dataclass(frozen=True, kw_only=True, slots=True)
class QLogLossConfig:
    """``(1 - p^q) / q``: between cross-entropy (q towards 0) and ``1 - p`` (q = 1)."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    kind: Literal["q_log"]
    q: float = 1.0
    """Power, > 0."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require(self.q > 0, f"q must be > 0, got {self.q}")


@dataclass(frozen=True, kw_only=True, slots=True)
class DeftLossConfig:
    """As ``q_log`` with each position's own power, the sum of squared probabilities."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    kind: Literal["deft"]


@dataclass(frozen=True, kw_only=True, slots=True)
class FocalLossConfig:
    """``(1 - p)^gamma`` times cross-entropy: hard tokens count more."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    kind: Literal["focal"]
    gamma: float = 2.0
    """Power, >= 0; 0 is cross-entropy."""
    detached: bool = False
    """Let the factor carry no gradient."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require(self.gamma >= 0, f"gamma must be >= 0, got {self.gamma}")


@dataclass(frozen=True, kw_only=True, slots=True)
class MileLossConfig:
    """Cross-entropy times ``(sigma + entropy)^gamma`` over the whole vocabulary."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    kind: Literal["mile"]
    sigma: float = 1.0
    """Added to the entropy, in nats, >= 0."""
    gamma: float = 1.0
    """Power."""
    normalize: Literal["tokens", "weights"] = "weights"
    """What a step's sum is divided by: the sum of weights, as published, or its target tokens."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require(self.sigma >= 0, f"sigma must be >= 0, got {self.sigma}")


@dataclass(frozen=True, kw_only=True, slots=True)
class TalrLossConfig:
    """Cross-entropy times ``max(p^(1/tau), floor)``: hard tokens count less."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    kind: Literal["talr"]
    tau: float
    """Temperature in nats, > 0; for instance the source model's mean loss on the target data."""
    floor: float = 0.01
    """Smallest weight, in [0, 1]."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require(self.tau > 0, f"tau must be > 0, got {self.tau}")
        require(0 <= self.floor <= 1, f"floor must lie in [0, 1], got {self.floor}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ConstantGateLossConfig:
    """A control: cross-entropy times one number, the same for every token."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    kind: Literal["constant_gate"]
    mean_gate: float
    """The number, in (0, 1]; for instance the mean of ``method/mean_gate`` in another run."""

    def __post_init__(self) -> None:
        """Check ranges."""
        _require_gate(self.mean_gate)


@dataclass(frozen=True, kw_only=True, slots=True)
class RandomGateLossConfig:
    """A control: cross-entropy times a random number per token, fixed by ``run.seed`` and place."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    kind: Literal["random_gate"]
    mean_gate: float
    """Mean of the numbers, in (0, 1]."""
    form: Literal["power", "drop"] = "power"
    """``power``: anywhere in [0, 1], as ``u^(1/mean_gate - 1)`` of a uniform ``u``; ``drop``: 1
    for a share ``mean_gate`` of the tokens and 0 for the others."""
    normalize: Literal["tokens", "weights"] = "tokens"
    """What a step's sum is divided by: its target tokens, or the sum of weights."""

    def __post_init__(self) -> None:
        """Check ranges."""
        _require_gate(self.mean_gate)


def _require_gate(mean_gate: float) -> None:
    require(0 < mean_gate <= 1, f"mean_gate must lie in (0, 1], got {mean_gate}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ReferenceConfig:
    """Where the source model's predictions come from: give one of ``cache`` and ``model``."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    cache: Path | None = None
    """Logit cache of this model and this data (``forgetscale analyze --cache-logits``)."""
    model: Literal["source"] | None = None
    """``source``: a second, frozen ZeRO-3 model computes them at each step."""
    top_k: int | None = None
    """Tokens per position for ``model: source``, > 0; None: 64. A cache has its own number."""

    def __post_init__(self) -> None:
        """Check ranges and clashes."""
        require(
            (self.cache is None) != (self.model is None),
            "give exactly one of cache and model",
        )
        require(
            self.top_k is None or self.model is not None,
            "top_k is for model: source; a cache has the number it was made with (analyze --top-k)",
        )
        require(self.top_k is None or self.top_k > 0, f"top_k must be > 0, got {self.top_k}")


@dataclass(frozen=True, kw_only=True, slots=True)
class KlLossConfig:
    """Divergence from given predictions and nothing else: soft targets.

    Rows of a cache that ``forgetscale generate --soft-cache`` made have the source model's own
    predictions where it wrote the text, and the label alone elsewhere, where the loss is plain
    cross-entropy.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    kind: Literal["kl"]
    reference: ReferenceConfig
    """The predictions."""
    direction: Literal["forward", "reverse"] = "forward"
    """``forward``: KL(reference || model); ``reverse``: KL(model || reference)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SftKlLossConfig:
    """Cross-entropy plus a divergence from the source model's predictions."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    kind: Literal["sft_kl"]
    reference: ReferenceConfig
    """The source model's predictions."""
    factor: float = 0.5
    """Factor of the divergence, >= 0; 0.5 is what arXiv:2601.02151 compares with."""
    direction: Literal["forward", "reverse"] = "forward"
    """``forward``: KL(source || model); ``reverse``: KL(model || source)."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require(self.factor >= 0, f"factor must be >= 0, got {self.factor}")


@dataclass(frozen=True, kw_only=True, slots=True)
class AsftLossConfig:
    """Anchored: cross-entropy times the label's probability, plus a divergence from the source."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    kind: Literal["asft"]
    reference: ReferenceConfig
    """The source model's predictions."""
    factor: float = 0.05
    """Factor of the divergence, >= 0."""
    direction: Literal["forward", "reverse"] = "forward"
    """``forward``: KL(source || model); ``reverse``: KL(model || source)."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require(self.factor >= 0, f"factor must be >= 0, got {self.factor}")


@dataclass(frozen=True, kw_only=True, slots=True)
class IwSftLossConfig:
    """Cross-entropy times ``clip(p / p_source, low, high)`` of the label."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    kind: Literal["iw_sft"]
    reference: ReferenceConfig
    """The source model's predictions."""
    low: float = 0.2
    """Smallest weight, >= 0."""
    high: float = 1.8
    """Largest weight, >= low."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require(
            0 <= self.low <= self.high,
            f"low and high must satisfy 0 <= low <= high, got {self.low} and {self.high}",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class PsftLossConfig:
    """Proximal: a token stops counting once its probability rose above ``1 + clip_high`` times."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    kind: Literal["psft"]
    reference: ReferenceConfig
    """The old policy: the source model for the whole run (the paper takes it anew every few
    steps)."""
    clip_low: float = 0.2
    """Clipping of the ratio below 1, >= 0; without effect on the gradient."""
    clip_high: float = 0.28
    """Clipping of the ratio above 1, >= 0."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require(
            self.clip_low >= 0 and self.clip_high >= 0,
            f"clip_low and clip_high must be >= 0, got {self.clip_low} and {self.clip_high}",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class FlowLossConfig:
    """Cross-entropy times ``exp(-f / tau)``, ``f`` the source model's mean loss on the text."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    kind: Literal["flow"]
    reference: ReferenceConfig
    """The source model's predictions; a cache, because ``f`` is known before training."""
    tau: float | None = None
    """Temperature in nats, > 0; None: the median of ``f`` over all texts of the cache."""

    def __post_init__(self) -> None:
        """Check ranges and clashes."""
        require(self.tau is None or self.tau > 0, f"tau must be > 0, got {self.tau}")
        require(
            self.reference.cache is not None,
            "flow weighs whole texts before training, so it needs reference.cache, not model",
        )


LossConfig = Annotated[
    CrossEntropyLossConfig
    | EaftLossConfig
    | DftLossConfig
    | QLogLossConfig
    | DeftLossConfig
    | FocalLossConfig
    | MileLossConfig
    | TalrLossConfig
    | ConstantGateLossConfig
    | RandomGateLossConfig
    | KlLossConfig
    | SftKlLossConfig
    | AsftLossConfig
    | IwSftLossConfig
    | PsftLossConfig
    | FlowLossConfig,
    Discriminator("kind"),
]


def loss_options(config: LossConfig) -> dict[str, Any]:
    """Return what the function of a loss is made with: its section without its inputs."""
    found = asdict(config)
    found.pop("reference", None)
    if config.kind == "flow":
        found.pop("tau")
    return found


def resolve_shorthand(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Write ``method: {kind: eaft, ...}`` out as ``sft`` with that loss.

    Raises:
        ConfigError: The section names a second loss.
    """
    method = values.get("method")
    if not isinstance(method, Mapping) or method.get("kind") not in SHORTHANDS:
        return values
    kind = method["kind"]
    options = {name: value for name, value in method.items() if name != "kind"}
    if "loss" in options:
        raise ConfigError(
            f"method.kind {kind} is sft with that loss, but method.loss is {options['loss']!r}; one"
            " run has one loss, so remove method.loss or name a protection in method.kind."
        )
    return {**values, "method": {"kind": "sft", "loss": {"kind": kind, **options}}}

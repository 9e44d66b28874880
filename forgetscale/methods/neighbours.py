"""O-LoRA, CLoRA and OPLoRA: published methods that work on whole factors, a pair at a time.

Each step gathers the pairs one after another (``r (O + I)`` numbers a matrix); what is added to
gradients or written to factors touches this rank's slices alone.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from forgetscale.api import Calibration, ParamShard, ShardSet, Unprotected
from forgetscale.config import CloraMethodConfig, OloraMethodConfig, OploraMethodConfig
from forgetscale.errors import ConfigError, DataError
from forgetscale.masks import AdapterPair
from forgetscale.methods.leading import leading_directions
from forgetscale.methods.ssu.targets import find_targets
from forgetscale.ops.neighbours import clora_pull, olora_pull, oplora_factors, random_basis

_WEIGHTS = "adapter_model.safetensors"


def _slice_of(whole: Tensor, shard: ParamShard) -> Tensor:
    return whole.reshape(-1)[shard.start : shard.start + shard.param.numel()].to(shard.param)


class FactorPenalty(Unprotected, ABC):
    """Adds the gradient of a sum over pairs to the factors' gradients.

    Args:
        strength: Weight of the sum, >= 0.
    """

    def __init__(self, strength: float) -> None:
        self._strength = strength
        self._value = 0.0

    @abstractmethod
    def pull(
        self, pair: AdapterPair, lora_a: Tensor, lora_b: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return a pair's value and its gradients by parameter name."""

    def transform_gradients(self, shards: ShardSet, step: int) -> None:
        """Add the gradients. Collective."""
        if self._strength == 0.0:
            return
        mine = {shard.name: shard for shard in shards if shard.grad is not None}
        self._value = 0.0
        for pair in shards.adapters.values():
            whole = shards.gather([pair.lora_A, pair.lora_B])
            value, pulls = self.pull(pair, whole[pair.lora_A], whole[pair.lora_B])
            self._value += self._strength * float(value)
            for name, pull in pulls.items():
                grad = mine[name].grad
                assert grad is not None
                grad.add_(_slice_of(pull, mine[name]), alpha=self._strength)

    def after_step(self, shards: ShardSet, step: int) -> Mapping[str, float]:
        """Return the penalty of the step."""
        return {"penalty": self._value}


class Olora(FactorPenalty):
    """Keep ``A`` off the rows of earlier tasks' ``A``.

    Args:
        config: Recipe section.
    """

    def __init__(self, config: OloraMethodConfig) -> None:
        super().__init__(config.strength if config.previous else 0.0)
        self._config = config
        self._rows: dict[str, Tensor] = {}

    def prepare(self, calibration: Calibration) -> None:
        """Read the earlier adapters.

        Raises:
            DataError: A folder holds no adapter, or one of another model.
        """
        structure: Any = calibration.structure
        widths = {n: p.shape[1] for n, p in structure.named_parameters() if p.dim() == 2}
        found: dict[str, list[Tensor]] = {}
        for directory in self._config.previous:
            for name, rows in read_factors_a(directory).items():
                if widths.get(name) != rows.shape[1]:
                    raise DataError(
                        f"method.previous: {directory} adapts {name} with {rows.shape[1]} inputs,"
                        f" the model has {widths.get(name)}; name adapters of this model."
                    )
                found.setdefault(name, []).append(rows)
        self._rows = {name: torch.cat(parts) for name, parts in found.items()}

    def pull(
        self, pair: AdapterPair, lora_a: Tensor, lora_b: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the overlap and its gradient; nothing where no earlier task adapted."""
        if pair.matrix not in self._rows:
            return torch.zeros(()), {}
        rows = self._rows[pair.matrix] = self._rows[pair.matrix].to(lora_a)
        value, pull = olora_pull(lora_a, rows, self._config.form)
        return value, {pair.lora_A: pull}


def read_factors_a(directory: Path) -> dict[str, Tensor]:
    """Return the ``A`` of an adapter folder by the adapted weight's name, fp32.

    Raises:
        DataError: There is none.
    """
    path = directory / _WEIGHTS
    found = {}
    try:
        with safetensors.safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
                if key.endswith(".lora_A.weight"):
                    name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                    found[f"{name}.weight"] = file.get_tensor(key).float()
    except (OSError, safetensors.SafetensorError) as error:
        raise DataError(f"{path} is no readable adapter ({error}); check the path.") from error
    if not found:
        raise DataError(f"{path} holds no lora_A; expected a LoRA adapter in PEFT's format.")
    return found


class Clora(FactorPenalty):
    """Keep both factors off fixed random directions.

    Args:
        config: Recipe section.
    """

    def __init__(self, config: CloraMethodConfig) -> None:
        super().__init__(config.strength)
        self._config = config
        self._seed = 0
        self._bases: dict[str, Tensor] = {}

    def prepare(self, calibration: Calibration) -> None:
        """Note the seed."""
        self._seed = calibration.seed

    def _basis(self, name: str, size: int, like: Tensor) -> Tensor:
        if name not in self._bases:
            digest = hashlib.sha256(f"clora/{self._seed}/{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            count = min(self._config.num_directions, size)
            self._bases[name] = random_basis(size, count, generator).to(like)
        return self._bases[name]

    def pull(
        self, pair: AdapterPair, lora_a: Tensor, lora_b: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return ``||A P_A||^2 + ||B^T P_B||^2`` and its gradients."""
        height, width = pair.shape
        of_a, pull_a = clora_pull(lora_a.t(), self._basis(pair.lora_A, width, lora_a))
        of_b, pull_b = clora_pull(lora_b, self._basis(pair.lora_B, height, lora_b))
        return of_a + of_b, {pair.lora_A: pull_a.t(), pair.lora_B: pull_b}


class Oplora(Unprotected):
    """Keep the update off the leading singular triples of the source weights, exactly.

    The paper folds the projectors into the forward pass. Here both factors are projected after each
    step: the applied update is the same ``(I - U U^T) B A (I - V V^T)``, the forward pass stays
    that of LoRA, and Adam's moments see the gradient before it is projected.

    Args:
        config: Recipe section.
    """

    def __init__(self, config: OploraMethodConfig) -> None:
        self._config = config
        self._sides: dict[str, tuple[Tensor, Tensor]] = {}

    def prepare(self, calibration: Calibration) -> None:
        """Find the leading directions of every matrix of the body. Collective."""
        targets = [t for t in find_targets(calibration.structure) if not t.is_vector]
        self._sides = leading_directions(calibration, targets, self._config.num_directions)

    def after_step(self, shards: ShardSet, step: int) -> Mapping[str, float]:
        """Project both factors; return the share of the update that was taken out."""
        mine = {shard.name: shard for shard in shards}
        removed = total = 0.0
        for pair in shards.adapters.values():
            if pair.matrix not in self._sides:
                raise ConfigError(
                    f"method.kind oplora: {pair.matrix} is no matrix of a decoder layer; leave it"
                    " out of adapter.target_modules."
                )
            whole = shards.gather([pair.lora_A, pair.lora_B])
            lora_a, lora_b = whole[pair.lora_A], whole[pair.lora_B]
            left, right = (side.to(lora_a) for side in self._sides[pair.matrix])
            self._sides[pair.matrix] = left, right
            new_a, new_b = oplora_factors(lora_a, lora_b, left, right)
            before = _square(lora_a, lora_b)
            removed += before - _square(new_a, new_b)
            total += before
            for name, value in ((pair.lora_A, new_a), (pair.lora_B, new_b)):
                mine[name].param.copy_(_slice_of(value, mine[name]))
        return {"removed": max(removed, 0.0) / total if total > 0 else 0.0}


def _square(lora_a: Tensor, lora_b: Tensor) -> float:
    """Return ``||B A||^2`` without forming it."""
    return float(((lora_b.t() @ lora_b).double() * (lora_a @ lora_a.t()).double()).sum())

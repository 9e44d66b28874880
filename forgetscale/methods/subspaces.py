"""AsFT, SaLoRA and LoRA-Null: published methods that know subspaces of an adapter's update.

What they know is found once, before training: AsFT's directions from the weights of an earlier
model, the others' from source data (kept in the run folder, so that a resume goes on with the same
bits). Ranks take matrices in turn; only directions travel.

Shape letters: O out features, I in features, r adapter rank, k directions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from forgetscale.api import Calibration, ShardSet, Unprotected
from forgetscale.config import (
    AsftLoraMethodConfig,
    CalibrationConfig,
    LoraNullMethodConfig,
    SaloraMethodConfig,
)
from forgetscale.errors import ConfigError
from forgetscale.masks import AdapterPair
from forgetscale.methods.anchored import require_same_state
from forgetscale.methods.inputs import InputMoment, input_moments
from forgetscale.methods.neighbours import FactorPenalty
from forgetscale.models import SafetensorsFolder
from forgetscale.ops.neighbours import (
    LeftMatrix,
    alignment_matrix,
    asft_pull,
    response_basis,
    weakest_directions,
)
from forgetscale.projections import Anchor, Guard, LeftFrame, Onto, Place, project_
from forgetscale.projections.basis import FisherBasis, MeasuredBasis

RESPONSES = "leading directions of a layer's outputs on source data, mean square of a token"
WEAK_INPUTS = "weakest directions of a layer's inputs on source data, mean square of a token"


class AsftLora(FactorPenalty):
    """Penalise what leaves the directions that alignment moved the weights along.

    Args:
        config: Recipe section.
    """

    def __init__(self, config: AsftLoraMethodConfig) -> None:
        super().__init__(config.strength)
        self._config = config
        self._matrices: dict[str, LeftMatrix] = {}
        self._norm = 0.0

    def prepare(self, calibration: Calibration) -> None:
        """Find the directions of every adapted matrix. Collective.

        Raises:
            ConfigError: The two models are the same, or nothing would be penalised.
            DataError: The earlier model is missing or has other shapes.
        """
        folder = SafetensorsFolder(self._config.base)
        structure: Any = calibration.structure
        folder.check_shapes({n: tuple(p.shape) for n, p in structure.named_parameters()})
        shards = calibration.shards()
        square = torch.zeros(1, dtype=torch.float64)
        for number, pair in enumerate(calibration.adapters.values()):
            height, width = pair.shape
            k = min(height, width, self._config.num_directions or height)
            self._require_rest(pair, k)
            found = torch.zeros(height + 1, k)
            if number % shards.size == shards.rank:
                aligned = calibration.read_source(pair.matrix, 0, height * width).double()
                base = folder.read_flat(pair.matrix, 0, height * width, torch.float64)
                difference = (aligned - base).view(height, width)
                square += difference.square().sum()
                matrix = alignment_matrix(difference, self._config.form)
                kept = min(k, matrix.values.numel())
                found[:height, :kept] = matrix.basis[:, :kept].float()
                found[height, :kept] = matrix.values[:kept].float()
            found = shards.all_reduce_sum(found)
            self._matrices[pair.matrix] = LeftMatrix(found[:height], found[height])
        self._norm = float(shards.all_reduce_sum(square).sqrt())
        if self._norm == 0.0:
            raise ConfigError(
                f"method.base: {self._config.base} holds the same weights as model.path, so"
                " alignment moved nothing; name the model before it was aligned."
            )

    def _require_rest(self, pair: AdapterPair, k: int) -> None:
        if self._config.form == "exact" and k == pair.shape[0]:
            raise ConfigError(
                f"method.num_directions: {k} directions are all outputs of {pair.module}, so the"
                " exact projector keeps every update and penalises nothing; set it to fewer, or"
                " form to published."
            )

    def pull(
        self, pair: AdapterPair, lora_a: Tensor, lora_b: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return ``||(I - C) dW||^2`` and its gradients."""
        basis, values = self._matrices[pair.matrix]
        matrix = LeftMatrix(basis.to(lora_b), values.to(lora_b))
        self._matrices[pair.matrix] = matrix
        scale = 1.0 if self._config.form == "published" else pair.scale
        found = asft_pull(matrix, lora_a, lora_b, scale)
        return found.value, {pair.lora_A: found.lora_a, pair.lora_B: found.lora_b}

    def state_dict(self) -> dict[str, Any]:
        """Return what identifies the earlier model: how far alignment moved the weights."""
        return {"difference of method.base": f"{self._norm:.6e}"}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Check that a checkpoint was made with the same earlier model."""
        require_same_state(state, self.state_dict())


def _measure(
    calibration: Calibration,
    source: CalibrationConfig,
    settings: Mapping[str, Any],
    directions: Callable[[InputMoment], tuple[Tensor, Tensor]],
    size: Callable[[AdapterPair], tuple[int, int]],
) -> MeasuredBasis:
    """Return directions of one side of every adapted matrix, as an artefact holds them.

    Args:
        calibration: The source model.
        source: Data.
        settings: What identifies the result beside model and data; names convention and side.
        directions: Returns directions ``[d, k]`` and values ``[k]`` of one layer.
        size: Returns ``(d, k)``.

    Collective: every rank must call it.
    """
    (side,) = settings["structures"]
    shards = calibration.shards()
    measured = MeasuredBasis()
    for number, found in enumerate(input_moments(calibration, source)):
        height, k = size(found.pair)
        whole = torch.zeros(height + 1, k)
        if number % shards.size == shards.rank:
            basis, values = directions(found)
            whole[:height], whole[height] = basis.float(), values.float()
        whole = shards.all_reduce_sum(whole)
        name = found.pair.matrix
        measured.whole[f"{side}/{name}"] = whole[:height].clone()
        measured.whole[f"values/{side}/{name}"] = whole[height].clone()
    measured.payload = {
        "convention": settings["convention"],
        "settings": dict(settings),
        "scale": {side: 1.0},
        "num_rows": calibration.num_rows(source),
        "seed": calibration.seed,
        **calibration.provenance(),
    }
    return measured


class _KnowsDirections(Unprotected):
    """A method whose directions are measured once and kept in the run folder."""

    def __init__(self) -> None:
        self._basis: FisherBasis | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the hash of the directions."""
        return {"directions": "" if self._basis is None else self._basis.self_hash}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Check that a checkpoint was made with the same directions."""
        require_same_state(state, self.state_dict())


class Salora(_KnowsDirections):
    """Keep the update off what layers say to safety data, exactly.

    The paper folds ``C = I - U U^T`` into the forward pass. Here ``B`` is projected after each
    step: the applied update is the same ``C B A``, the forward pass stays that of LoRA, and Adam's
    moments see the gradient before it is projected.

    Args:
        config: Recipe section.
    """

    def __init__(self, config: SaloraMethodConfig) -> None:
        super().__init__()
        self._config = config
        self._guards: list[Guard] | None = None

    def prepare(self, calibration: Calibration) -> None:
        """Settle the directions of every adapted layer's outputs. Collective."""
        config = self._config
        settings = {
            "convention": RESPONSES,
            "structures": ["left"],
            "num_directions": config.num_directions,
            "matrices": list(calibration.adapters),
        }

        def size(pair: AdapterPair) -> tuple[int, int]:
            height = pair.shape[0]
            return height, max(1, min(config.num_directions, height // 2))

        def directions(found: InputMoment) -> tuple[Tensor, Tensor]:
            height, width = found.pair.shape
            weight = calibration.read_source(found.pair.matrix, 0, height * width).double()
            k = size(found.pair)[1]
            return response_basis(weight.view(height, width), found.moment, k)

        self._basis = calibration.settle_basis(
            None,
            settings,
            lambda: _measure(calibration, config.calibration, settings, directions, size),
        )

    def _settle(self, shards: ShardSet) -> list[Guard]:
        if self._guards is None:
            assert self._basis is not None, "prepare comes first"
            mine = {shard.name: shard for shard in shards}
            self._guards = []
            for pair in shards.adapters.values():
                shard = mine[pair.lora_B]
                place = Place(shard.shape, shard.start, shard.param.numel())
                frame = LeftFrame(place, self._basis.side("left", pair.matrix).to(shard.param))
                self._guards.append(Guard(pair.lora_B, place, Anchor(), None, Onto(frame)))
        return self._guards

    def after_step(self, shards: ShardSet, step: int) -> Mapping[str, float]:
        """Project ``B``; return the share of its norm that was taken out. Collective."""
        guards = self._settle(shards)
        wanted = {guard.name for guard in guards}
        params = {shard.name: shard.param for shard in shards if shard.name in wanted}
        return {"removed": project_(guards, params, shards.all_reduce_sum).leak}


class LoraNull(_KnowsDirections):
    """Start ``A`` in the input directions that source data hardly use.

    Args:
        config: Recipe section.
    """

    def __init__(self, config: LoraNullMethodConfig) -> None:
        super().__init__()
        self._config = config

    def prepare(self, calibration: Calibration) -> None:
        """Settle the weakest input directions of every adapted layer. Collective."""
        config = self._config
        settings = {
            "convention": WEAK_INPUTS,
            "structures": ["right"],
            "ranks": {pair.matrix: pair.rank for pair in calibration.adapters.values()},
        }

        def size(pair: AdapterPair) -> tuple[int, int]:
            return pair.shape[1], pair.rank

        self._basis = calibration.settle_basis(
            None,
            settings,
            lambda: _measure(
                calibration,
                config.calibration,
                settings,
                lambda found: weakest_directions(found.moment, found.pair.rank),
                size,
            ),
        )

    def _put(self, shards: ShardSet) -> None:
        """Set this rank's slices of every ``A``."""
        assert self._basis is not None, "prepare comes first"
        mine = {shard.name: shard for shard in shards}
        for pair in shards.adapters.values():
            shard = mine[pair.lora_A]
            rows = self._basis.side("right", pair.matrix).t().reshape(-1)
            shard.param.copy_(rows[shard.start : shard.start + shard.param.numel()])

    def start(self, shards: ShardSet) -> None:
        """Set every ``A``; ``B`` is zero already."""
        self._put(shards)

    def after_step(self, shards: ShardSet, step: int) -> Mapping[str, float]:
        """Put ``A`` back where it is held."""
        if self._config.freeze_a:
            self._put(shards)
        return {}

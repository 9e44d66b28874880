"""What a run's loss gets at each target beside logits and labels: noise, a reference model's view.

Tensors are aligned with labels: what stands at token ``t`` belongs to the prediction of ``t``.
"""

from __future__ import annotations

from torch import Tensor

from forgetscale.config import Recipe
from forgetscale.data import StreamBatch
from forgetscale.engine.micro_batches import MicroBatch
from forgetscale.ops.losses import LossFunction, TokenLoss
from forgetscale.ops.noise import position_noise


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


def open_extras(recipe: Recipe, loss: LossFunction) -> LossExtras:
    """Return what fills the loss's needs.

    Args:
        recipe: Resolved recipe.
        loss: Loss of its method.
    """
    needs = loss.needs if isinstance(loss, TokenLoss) else ()
    return NoiseExtras(recipe.run.seed) if "noise" in needs else LossExtras()

"""Lottery ticket adaptation (LoTA): train briefly, keep what moved most, rewind, train only that.

Source: arXiv:2406.16797, as run by gucci-j/ssu (``lota_calibrate_mask``): AdamW at a constant rate
on the *target* data for ``num_trial_steps`` steps, then the share ``trainable_fraction`` of the
body's elements with the largest ``|change|`` over all tensors together may move in the real run,
which starts from the source weights again. Embedding and head are trained in both. The trial uses
the recipe's data order, batch, decay, clipping and precision.

Changes are taken from fp32 masters; that code takes them in bf16, where many are equal or zero, and
keeps all that equal the threshold. Here exactly ``floor(fraction * elements)`` are trained: of
equal changes the earlier element (in the model's order) is frozen.

The target data choose what moves; nothing is known of what the source model needs.
"""

from __future__ import annotations

from torch import Tensor

from forgetscale.api import Calibration, ParamShard, Unprotected
from forgetscale.config import LotaMethodConfig
from forgetscale.masks import FreezePlan
from forgetscale.methods.element_choice import choose_elements
from forgetscale.methods.structure import body_sizes
from forgetscale.ops.importance import num_frozen as floor_share


class Lota(Unprotected):
    """Freeze the elements of the body that a trial on target data moves least.

    Args:
        config: Recipe section.
    """

    def __init__(self, config: LotaMethodConfig) -> None:
        self._config = config

    def prepare(self, calibration: Calibration) -> FreezePlan:
        """Run the trial and return the plan. Collective: every rank must call it."""
        config = self._config
        changes = calibration.target_changes(config.num_trial_steps, config.trial_lr)

        def least_moved(shard: ParamShard) -> Tensor:
            return -shard.param.float().abs()

        elements = choose_elements(
            changes,
            body_sizes(calibration.structure),
            lambda size: size - floor_share(size, config.trainable_fraction),
            least_moved,
            scope="global",
        )
        provenance = {
            "method": "lota",
            "trainable_fraction": config.trainable_fraction,
            "num_trial_steps": config.num_trial_steps,
            "trial_lr": config.trial_lr,
            **calibration.provenance(),
        }
        return FreezePlan(elements=elements, provenance=provenance)

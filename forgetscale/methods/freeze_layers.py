"""Train some layers at one end of the decoder, freeze the others: the oldest way to forget less.

Source: the layer-freezing baseline of arXiv:2602.20162 as far as it is known (the layers
are not named there), with the sign convention of LLaMA-Factory's ``freeze_trainable_layers``.
"""

from __future__ import annotations

from collections.abc import Sequence

from forgetscale.api import Calibration, Unprotected
from forgetscale.config import FreezeLayersMethodConfig
from forgetscale.errors import ConfigError
from forgetscale.masks import FreezePlan
from forgetscale.methods.structure import decoder_layers, end_parameters


class FreezeLayers(Unprotected):
    """Freeze all decoder layers but some at one end.

    Args:
        config: Recipe section.
    """

    def __init__(self, config: FreezeLayersMethodConfig) -> None:
        self._config = config

    def prepare(self, calibration: Calibration) -> FreezePlan:
        """Return the plan; nothing is measured.

        Raises:
            ConfigError: The model has fewer layers than are to be trained.
        """
        config = self._config
        layers = decoder_layers(calibration.structure, "freeze_layers")
        count = config.trainable_layers
        if abs(count) > len(layers):
            raise ConfigError(
                f"method.trainable_layers is {count}, but the model has {len(layers)} layers; name"
                " fewer."
            )
        trained = layers[-count:] if count > 0 else layers[:-count]
        prefixes = tuple(f"{prefix}." for prefix, _ in trained)
        ends = set(end_parameters(calibration.structure))
        whole = {
            name
            for name, _ in calibration.structure.named_parameters()
            if not name.startswith(prefixes)
            and (config.ends == "freeze" or not _is_end(name, ends, layers))
        }
        return FreezePlan(
            whole=frozenset(whole),
            provenance={
                "method": "freeze_layers",
                "trainable_layers": count,
                "ends": config.ends,
                **calibration.provenance(),
            },
        )


def _is_end(name: str, ends: set[str], layers: Sequence[tuple[str, object]]) -> bool:
    """Return whether a parameter is embedding, head or a norm outside all layers."""
    return name in ends or not name.startswith(tuple(f"{prefix}." for prefix, _ in layers))

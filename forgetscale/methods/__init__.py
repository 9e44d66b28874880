"""Protections. A method is chosen by ``method.kind`` in the recipe, its loss by ``method.loss``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from forgetscale.api import Method, Unprotected
from forgetscale.config import loss_options
from forgetscale.methods.adalora import Adalora
from forgetscale.methods.alignguard_lora import AdapterAnchor
from forgetscale.methods.anchors import Alignguard, Ewc, L2Sp, Osf
from forgetscale.methods.freeze_layers import FreezeLayers
from forgetscale.methods.gmt import Gmt, GmtOfficial
from forgetscale.methods.hft import Hft
from forgetscale.methods.lota import Lota
from forgetscale.methods.mofo import Mofo
from forgetscale.methods.neighbours import Clora, Olora, Oplora
from forgetscale.methods.s2ft import S2ft
from forgetscale.methods.sft import Sft
from forgetscale.methods.spd import Spd
from forgetscale.methods.ssu import Ssu
from forgetscale.methods.subspaces import AsftLora, LoraNull, Salora
from forgetscale.ops.losses import make_loss

_PROTECTIONS: Mapping[str, Callable[[Any], Unprotected]] = {
    "sft": lambda config: Sft(),
    "ssu": Ssu,
    "hft": Hft,
    "freeze_layers": FreezeLayers,
    "gmt": Gmt,
    "gmt_official": GmtOfficial,
    "lota": Lota,
    "s2ft": S2ft,
    "adalora": Adalora,
    "l2_sp": L2Sp,
    "ewc": Ewc,
    "online_ewc": Ewc,
    "alignguard": Alignguard,
    "osf": Osf,
    "alignguard_lora": AdapterAnchor,
    "ewc_lora": AdapterAnchor,
    "l2_sp_lora": AdapterAnchor,
    "olora": Olora,
    "clora": Clora,
    "oplora": Oplora,
    "asft_lora": AsftLora,
    "salora": Salora,
    "lora_null": LoraNull,
    "spd": Spd,
    "mofo": Mofo,
}


def _with_loss(protection: Callable[[Any], Unprotected]) -> Callable[[Any], Method]:
    """Return a constructor that hands a protection the loss of its section."""

    def make(config: Any) -> Method:
        method = protection(config)
        method.loss = make_loss(**loss_options(config.loss))
        return method

    return make


METHODS: Mapping[str, Callable[[Any], Method]] = {
    kind: _with_loss(protection) for kind, protection in _PROTECTIONS.items()
}
"""``method.kind`` -> constructor taking the recipe's method section."""

"""Protections. A method is chosen by ``method.kind`` in the recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from forgetscale.api import Method
from forgetscale.methods.gmt import Gmt, GmtOfficial
from forgetscale.methods.hft import Hft
from forgetscale.methods.lota import Lota
from forgetscale.methods.s2ft import S2ft
from forgetscale.methods.sft import Sft
from forgetscale.methods.ssu import Ssu

METHODS: Mapping[str, Callable[[Any], Method]] = {
    "sft": lambda config: Sft(),
    "ssu": Ssu,
    "hft": Hft,
    "gmt": Gmt,
    "gmt_official": GmtOfficial,
    "lota": Lota,
    "s2ft": S2ft,
}
"""``method.kind`` -> constructor taking the recipe's method section."""

"""Looks at models and data that are no training: one module for each, all behind ``analyze``.

Two kinds: analyses of a recipe's model and data, and analyses of model folders, without a recipe.

A module has ``SUMMARY`` (one line), ``add_arguments(parser)`` for options of its own, and
``run(options, recipe, world, log)``, which every rank calls; ``output_of(options, recipe)`` is the
folder it writes. A module of the second kind has ``run(options)`` alone; the options all of them
share are in ``two_models``.
"""

from __future__ import annotations

from collections.abc import Mapping

ANALYSES: Mapping[str, str] = {
    "cache-logits": "forgetscale.analysis.cache_logits",
    "landscape": "forgetscale.analysis.landscape",
}
"""Flag of ``forgetscale analyze`` -> module."""

FOLDER_ANALYSES: Mapping[str, str] = {
    "delta": "forgetscale.analysis.delta",
    "mastery": "forgetscale.analysis.mastery",
    "token-kl": "forgetscale.analysis.token_kl",
}
"""The same for analyses that need no recipe."""

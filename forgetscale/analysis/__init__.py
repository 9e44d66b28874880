"""Looks at models and data that are no training: one module for each, all behind ``analyze``.

A module has ``SUMMARY`` (one line), ``add_arguments(parser)`` for options of its own, and
``run(options, recipe, world, log)``, which every rank calls; ``output_of(options, recipe)`` is the
folder it writes.
"""

from __future__ import annotations

from collections.abc import Mapping

ANALYSES: Mapping[str, str] = {
    "cache-logits": "forgetscale.analysis.cache_logits",
    "landscape": "forgetscale.analysis.landscape",
}
"""Flag of ``forgetscale analyze`` -> module."""

"""Jobs around ``forgetscale analyze``: small files, a kill between two of them."""

from __future__ import annotations

from typing import Any
from unittest import mock

import forgetscale.analysis.cache_logits as cache_logits
from tests.distributed.jobs.cli import run
from tests.distributed.jobs.crash import Countdown, always, before, die


def cache(arguments: list[str], rows: int, die_at: int | None = None) -> None:
    """Run the command with ``rows`` rows a file; die before the ``die_at``-th file of each rank."""
    original: Any = cache_logits.write_span
    if die_at is not None:
        original = before(Countdown(die_at, die, None), original, always)
    with (
        mock.patch.object(cache_logits, "rows_per_file", lambda *_: rows),
        mock.patch.object(cache_logits, "write_span", original),
    ):
        run(arguments)

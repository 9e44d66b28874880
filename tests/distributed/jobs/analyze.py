"""Jobs around ``forgetscale analyze``: small files, a kill between two of them."""

from __future__ import annotations

from typing import Any
from unittest import mock

import forgetscale.analysis.cache_logits as cache_logits
from tests.distributed.jobs.cli import run
from tests.distributed.jobs.crash import Countdown, always, before, die, signal_when


def cache(
    arguments: list[str], rows: int, die_at: int | None = None, stop_at: int | None = None
) -> None:
    """Run the command with ``rows`` rows a file.

    Args:
        arguments: Of the command line.
        rows: Rows of a file.
        die_at: Die before this file of each rank, counted from 1.
        stop_at: Be asked to stop after this turn of the ranks, counted from 1.
    """
    original: Any = cache_logits.write_span
    if die_at is not None:
        original = before(Countdown(die_at, die, None), original, always)
    with (
        mock.patch.object(cache_logits, "rows_per_file", lambda *_: rows),
        mock.patch.object(cache_logits, "write_span", original),
    ):
        if stop_at is None:
            run(arguments)
        signal_when(arguments, "during the pass over rows", stop_at or 0)

"""Ranks of one worker whose model lies between them, and one that does not come."""

from __future__ import annotations

import os
import time

from forgetscale.cli import main
from forgetscale.generation.engines.slots import SlotEngine


def late(config: str, steps: int, seconds: float) -> None:
    """Generate; rank 1 falls asleep after some steps."""
    if os.environ["RANK"] == "1":
        step, done = SlotEngine.step, []

        def sleepy(self):
            done.append(1)
            if len(done) > steps:
                time.sleep(seconds)
            return step(self)

        SlotEngine.step = sleepy
    raise SystemExit(main(["generate", "--config", config]))


def stopping(config: str, steps: int) -> None:
    """Generate; rank 1 alone is asked to stop after some steps."""
    if os.environ["RANK"] == "1":
        step, done = SlotEngine.step, []

        def asked(self):
            done.append(1)
            if len(done) == steps:
                os.kill(os.getpid(), 10)  # SIGUSR1
            return step(self)

        SlotEngine.step = asked
    raise SystemExit(main(["generate", "--config", config]))

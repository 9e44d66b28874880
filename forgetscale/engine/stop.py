"""A request to stop: the signal handler sets a flag, the step boundary acts on it."""

from __future__ import annotations

import signal
from types import FrameType

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


class StopRequest:
    """Remember that SIGUSR1 or SIGTERM arrived.

    Nothing is saved inside the handler: ranks get the signal at different moments, and a
    collective save must start at the same step on all of them.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True

    def close(self) -> None:
        """Put the old handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

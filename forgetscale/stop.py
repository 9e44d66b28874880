"""A request to stop: the signal handler sets a flag, agreed moments act on it."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


class StopRequest:
    """Remember that SIGUSR1 or SIGTERM arrived, once ``listen`` was called.

    Nothing is saved inside the handler: ranks get the signal at different moments, and what they
    do about it must start at the same place on all of them.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def listen(self) -> None:
        """Take the signals over."""
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True

    def close(self) -> None:
        """Put the old handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

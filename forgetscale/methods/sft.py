"""Plain training: every parameter moves. The paper's FFT and every comparison's control."""

from __future__ import annotations

from forgetscale.api import Unprotected


class Sft(Unprotected):
    """Protect nothing."""

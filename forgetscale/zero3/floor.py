"""The oldest torch whose loading of files is safe."""

from __future__ import annotations

import torch

from forgetscale.errors import ConfigError

TORCH_FLOOR = (2, 10)
"""Below 2.6 ``torch.load(weights_only=True)`` runs code (CVE-2025-32434), below 2.10 a file can
corrupt memory (CVE-2026-24747)."""


def require_torch(version: str = torch.__version__) -> None:
    """Check the version of torch.

    Args:
        version: Version, such as ``2.13.0+cpu``.

    Raises:
        ConfigError: It is older than ``TORCH_FLOOR``.
    """
    parts = version.partition("+")[0].split(".")
    found = tuple(int("".join(filter(str.isdigit, part)) or 0) for part in parts[:2])
    if found < TORCH_FLOOR:
        wanted = ".".join(map(str, TORCH_FLOOR))
        raise ConfigError(
            f"torch is {version}, expected {wanted} or newer: in older versions a crafted file can"
            " run code when it is read, also with weights_only; install a newer torch."
        )

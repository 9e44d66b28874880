"""What ranks do in tests; each function runs on every rank of a process group.

Imported by the rank server, not by tests: DeepSpeed stays out of the test process.
"""

from __future__ import annotations

from pathlib import Path

INSTANT = "killed after step "
"""What a rank says that is killed at a random time."""


def flip_bit(path: Path) -> None:
    """Change one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(bytes(data))

"""Labelled points of the protocols that must survive a kill at any instant.

Code that writes what a later start relies on calls ``reach`` between any two effects on the disk.
Nothing happens there unless somebody set a hook: ``launch/bench/faults.py`` and the tests kill the
process at each point, or let the file system fail, and compare what the next start makes of it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

Hook = Callable[[str, Path], None]
"""``(label, path)``: what was reached, and the file or folder it is about."""

LABELS = (
    "save: asked",
    "save: begun",
    "save: folder made",
    "save: states copied",
    "file: opened",
    "file: begun",
    "file: written",
    "file: flushed",
    "file: verified",
    "save: rank done",
    "save: all ranks done",
    "publish: files flushed",
    "json: written",
    "publish: manifest written",
    "publish: renamed",
    "save: published",
    "prune: old one renamed",
    "prune: old one removed",
)
"""All labels, in the order in which a save passes them."""

_hook: Hook | None = None


def reach(label: str, path: Path) -> None:
    """Say that a point was reached; a call of nothing unless a hook is set.

    Args:
        label: One of ``LABELS``.
        path: File or folder the next effect is about.
    """
    if _hook is not None:
        _hook(label, path)


def set_hook(hook: Hook | None) -> None:
    """Let ``hook`` be called at every point of this process, in whatever thread passes it."""
    global _hook
    _hook = hook

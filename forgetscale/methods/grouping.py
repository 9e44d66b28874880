"""What is measured in one pass over data: as many items as fit in the allowed memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def groups_within(items: Iterable[tuple[T, int]], limit: int) -> Iterator[list[T]]:
    """Cut items into groups, in order, that need at most ``limit`` bytes each.

    Args:
        items: Each with the bytes it needs; one that needs more than ``limit`` is a group of its
            own, so callers refuse it with a sentence that says what to change.
        limit: Bytes.
    """
    group: list[T] = []
    used = 0
    for item, size in items:
        if group and used + size > limit:
            yield group
            group, used = [], 0
        group.append(item)
        used += size
    if group:
        yield group

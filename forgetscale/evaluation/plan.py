"""Who evaluates what: the same batches for any number of ranks, and the same number of calls.

Every forward call of a ZeRO-3 model is a collective: a rank that makes one call fewer leaves the
others waiting for ever. So the calls are agreed before the first one: samples are sorted and cut
into batches without looking at the ranks, batch ``i`` goes to rank ``i % world_size``, and a rank
with fewer batches repeats one whose results are thrown away.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from forgetscale.errors import ForgetScaleError
from forgetscale.evaluation.collective import Collective

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class PlannedBatch:
    """One forward call of one rank.

    Attributes:
        items: Positions of the samples in the caller's list.
        dummy: True if the call only keeps the number of calls equal; drop its results.
        number: Number of the batch over all ranks (the same batch has the same number on any
            world size).
    """

    items: tuple[int, ...]
    dummy: bool
    number: int


def plan_batches(
    lengths: Sequence[int], batch_size: int, *, rank: int = 0, world_size: int = 1
) -> list[PlannedBatch]:
    """Return the calls of ``rank``; every rank gets the same number of them.

    Args:
        lengths: Tokens of each sample; samples of similar length share a batch.
        batch_size: Samples in a batch, >= 1.
        rank: This rank.
        world_size: Number of ranks.

    Returns:
        ``ceil(num_batches / world_size)`` calls; over all ranks every sample stands in exactly
        one call that is no dummy.

    Raises:
        ValueError: ``batch_size`` is below 1 or ``rank`` is not one of ``world_size``.
    """
    return share_batches(cut_batches(lengths, batch_size), rank=rank, world_size=world_size)


def cut_batches(lengths: Sequence[int], batch_size: int) -> list[PlannedBatch]:
    """Cut samples into batches, longest first, without looking at ranks.

    Args:
        lengths: Tokens of each sample; samples of similar length share a batch.
        batch_size: Samples in a batch, >= 1.

    Raises:
        ValueError: ``batch_size`` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be >= 1, got {batch_size}")
    order = sorted(range(len(lengths)), key=lambda item: (-lengths[item], item))
    return [
        PlannedBatch(tuple(order[start : start + batch_size]), dummy=False, number=number)
        for number, start in enumerate(range(0, len(order), batch_size))
    ]


def share_batches(
    batches: Sequence[PlannedBatch], *, rank: int, world_size: int
) -> list[PlannedBatch]:
    """Return the calls of ``rank``: batch ``i`` of the list goes to rank ``i % world_size``.

    A rank that gets one batch fewer repeats the last one as a dummy.

    Args:
        batches: The same list on every rank, such as those of ``cut_batches`` that are not done.
        rank: This rank.
        world_size: Number of ranks.

    Raises:
        ValueError: ``rank`` is not one of ``world_size``.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in 0..{world_size - 1}, got {rank}")
    calls = -(-len(batches) // world_size)
    places = range(rank, calls * world_size, world_size)
    return [
        batches[place] if place < len(batches) else replace(batches[-1], dummy=True, number=place)
        for place in places
    ]


def num_calls(num_items: int, batch_size: int, world_size: int) -> int:
    """Return the calls every rank makes for ``num_items`` samples."""
    num_batches = -(-num_items // batch_size)
    return -(-num_batches // world_size)


def gather_exactly_once(
    collective: Collective, local: Mapping[K, V], expected: Iterable[K]
) -> dict[K, V]:
    """Merge the results of all ranks and check that each sample came back exactly once.

    Collective: every rank must call it.

    Args:
        collective: The processes that evaluate together.
        local: Sample key -> result of this rank.
        expected: Keys of all samples, the same on every rank.

    Returns:
        Key -> result in the order of ``expected``, the same on all ranks.

    Raises:
        ForgetScaleError: A sample is missing, came from two ranks, or was never asked for.
    """
    merged: dict[K, V] = {}
    for rank, part in enumerate(collective.gather_objects(dict(local))):
        for key, value in part.items():
            if key in merged:
                raise ForgetScaleError(
                    f"evaluation: sample {key!r} came back twice, the second time from rank"
                    f" {rank}; expected each sample once over {collective.world_size} ranks."
                )
            merged[key] = value
    keys = list(expected)
    missing = [key for key in keys if key not in merged]
    if missing or len(merged) != len(keys):
        strange = sorted(map(repr, set(merged) - set(keys)))
        what = f"sample {missing[0]!r} is missing" if missing else f"{strange[0]} was not asked for"
        raise ForgetScaleError(
            f"evaluation: {what}: {len(merged)} results for {len(keys)} samples over"
            f" {collective.world_size} ranks; every rank must evaluate the same tasks."
        )
    return {key: merged[key] for key in keys}

"""How evaluation talks to other processes: three members, injected by the caller.

Evaluation itself never touches a process group, so the same code runs on one process without
``torch.distributed``, on the ranks of a live ZeRO-3 engine, and in tests with threads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from forgetscale.errors import ForgetScaleError

T = TypeVar("T")


class Collective(Protocol):
    """The processes that evaluate together."""

    @property
    def rank(self) -> int:
        """Global number of this process, 0 to ``world_size - 1`` (never the local one)."""
        ...

    @property
    def world_size(self) -> int:
        """Number of processes."""
        ...

    def gather_objects(self, value: T) -> list[T]:
        """Return every rank's ``value`` in rank order, on all ranks.

        Collective: every rank must call it.
        """
        ...


@dataclass(frozen=True, slots=True)
class SingleProcess:
    """One process alone; needs no process group."""

    rank: int = 0
    world_size: int = 1

    def gather_objects(self, value: T) -> list[T]:
        """Return ``[value]``."""
        return [value]


class ProcessGroupCollective:
    """The ranks of an initialised ``torch.distributed`` process group.

    Args:
        group: Process group; None for the default one. Objects travel pickled between ranks of
            the same job, so a group that moves CPU tensors (gloo) is the cheapest.
    """

    def __init__(self, group: Any = None) -> None:
        import torch.distributed

        self._distributed = torch.distributed
        self._group = group

    @property
    def rank(self) -> int:
        """Global number of this process."""
        return int(self._distributed.get_rank(self._group))

    @property
    def world_size(self) -> int:
        """Number of processes in the group."""
        return int(self._distributed.get_world_size(self._group))

    def gather_objects(self, value: T) -> list[T]:
        """Return every rank's ``value`` in rank order, on all ranks.

        Collective: every rank must call it.
        """
        gathered: list[Any] = [None] * self.world_size
        self._distributed.all_gather_object(gathered, value, group=self._group)
        return gathered


def publish_on_rank_zero(collective: Collective, publish: Callable[[], object]) -> None:
    """Call ``publish`` on rank 0; no rank returns before it is done, all raise if it fails.

    Collective: every rank must call it.

    Args:
        collective: The processes that evaluate together.
        publish: Writes files.

    Raises:
        ForgetScaleError: Writing failed; on rank 0 the original error.
    """
    failure: ForgetScaleError | OSError | None = None
    if collective.rank == 0:
        try:
            publish()
        except (ForgetScaleError, OSError) as error:
            failure = error
    outcome = collective.gather_objects(None if failure is None else str(failure))[0]
    if failure is not None:
        raise failure
    if outcome is not None:
        raise ForgetScaleError(f"rank 0 could not write the results: {outcome}")

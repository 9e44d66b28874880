"""Which parameters ZeRO-3 keeps gathered while the model runs, in bytes.

A replay of ``PartitionedParameterCoordinator`` (DeepSpeed 0.19.8) on one step after its trace is
complete: what a module needs is fetched, the next ``prefetch_bucket_size`` elements are fetched
ahead, and what is used again within ``max_reuse_distance`` elements is not released. Several
parameters gathered at once lie in one buffer *and* in copies of their own until the last of them
was asked for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Action = Literal["fetch", "release"]


@dataclass(frozen=True, slots=True)
class Event:
    """A module begins (``fetch``) or ends (``release``), in forward or in backward."""

    action: Action
    module: int


@dataclass(frozen=True, slots=True)
class GatherSettings:
    """What the DeepSpeed JSON says about gathering, in elements; defaults are DeepSpeed's."""

    prefetch_bucket_size: int = 50_000_000
    param_persistence_threshold: int = 100_000
    model_persistence_threshold: int = 2**63 - 1
    max_live_parameters: int = 1_000_000_000
    max_reuse_distance: int = 1_000_000_000

    @classmethod
    def read(cls, zero: Mapping[str, Any]) -> GatherSettings:
        """Read them from the section ``zero_optimization``."""
        names = cls.__dataclass_fields__
        given = {name: zero[f"stage3_{name}"] for name in names if f"stage3_{name}" in zero}
        return cls(**{name: int(value) for name, value in given.items()})

    def persistent(self, numels: Sequence[int]) -> set[int]:
        """Return the parameters that are never released.

        Args:
            numels: Elements of each parameter, in the model's order.
        """
        found: set[int] = set()
        total = 0
        for param, numel in enumerate(numels):
            if numel + total <= self.model_persistence_threshold:
                if numel <= self.param_persistence_threshold:
                    found.add(param)
                    total += numel
        return found


@dataclass(slots=True)
class _Handle:
    """One gather: its parameters that nobody has asked for yet, and its buffer."""

    waiting: set[int]
    coalesced: bool
    buffer: int


@dataclass(slots=True)
class _Coordinator:
    numels: Sequence[int]
    params_of: Mapping[int, Sequence[int]]
    events: Sequence[Event]
    world_size: int
    settings: GatherSettings
    persistent: set[int]
    available: set[int] = field(default_factory=set)
    users: dict[int, set[int]] = field(default_factory=dict)
    inflight: dict[int, _Handle] = field(default_factory=dict)
    fetched_for: dict[int, int] = field(default_factory=dict)
    queue: deque[tuple[int, int]] = field(default_factory=deque)
    order: list[int] = field(default_factory=list)
    num_available: int = 0
    step: int = 0
    held: int = 0
    most: int = 0

    def __post_init__(self) -> None:
        self.available |= self.persistent
        self.order = [event.module for event in self.events if event.action == "fetch"]
        self.queue = deque(
            (param, step)
            for step, module in enumerate(self.order)
            for param in sorted(set(self.params_of[module]))
        )

    def _add(self, numel: int) -> None:
        self.held += numel
        self.most = max(self.most, self.held)

    def _gather(self, params: Sequence[int]) -> None:
        wanted = [p for p in params if p not in self.available and p not in self.inflight]
        if not wanted:
            return
        size = self.world_size
        buffer = sum(-(-self.numels[p] // size) * size for p in wanted)
        handle = _Handle(set(wanted), len(wanted) > 1, buffer)
        for param in wanted:
            self.inflight[param] = handle
            self.num_available += self.numels[param]
        self._add(buffer)

    def _wait(self, param: int) -> None:
        handle = self.inflight.pop(param)
        if handle.coalesced:
            for other in handle.waiting - self.available:
                self.available.add(other)
                self._add(self.numels[other])
        self.available.add(param)
        handle.waiting.discard(param)
        if handle.coalesced and not handle.waiting:
            self.held -= handle.buffer

    def fetch(self, module: int) -> None:
        params = sorted(set(self.params_of[module]))
        self._gather(params)
        for param in params:
            self.users.setdefault(param, set()).add(module)
            if param in self.inflight:
                self._wait(param)
        self._drop_from_queue({p for p in params if self.fetched_for.get(p, -1) < self.step})
        self._prefetch()
        self.step += 1

    def _drop_from_queue(self, wanted: set[int]) -> None:
        dropped: set[int] = set()
        while self.queue and len(dropped) < len(wanted):
            param, step = self.queue.popleft()
            self.fetched_for[param] = step
            dropped.add(param)
        assert dropped == wanted, (self.step, dropped, wanted)

    def _prefetch(self) -> None:
        settings = self.settings
        limit = min(
            settings.max_live_parameters - self.num_available, settings.prefetch_bucket_size
        )
        chosen: list[int] = []
        numel = 0
        while self.queue and numel < limit:
            param, step = self.queue.popleft()
            self.fetched_for[param] = max(self.fetched_for.get(param, -1), step)
            if param not in self.available and param not in self.inflight and param not in chosen:
                chosen.append(param)
                numel += self.numels[param]
        self._gather(chosen)

    def release(self, module: int) -> None:
        mine = set(self.params_of[module])
        released = {p for p in mine - self.persistent if self.fetched_for.get(p, -1) <= self.step}
        passed = 0
        for later in self.order[self.step :]:
            if passed >= self.settings.max_reuse_distance:
                break
            released -= set(self.params_of[later])
            passed += sum(self.numels[p] for p in self.params_of[later])
        for param in mine:
            self.users[param].discard(module)
            if param in released and param in self.available and not self.users[param]:
                self.available.discard(param)
                self.num_available -= self.numels[param]
                self.held -= self.numels[param]


def gathered_elements(
    numels: Sequence[int],
    params_of: Mapping[int, Sequence[int]],
    events: Sequence[Event],
    *,
    world_size: int,
    settings: GatherSettings,
) -> list[int]:
    """Return the most elements gathered at each event and until the next, persistent ones too.

    One rank gathers nothing: it computes with its slices.

    Args:
        numels: Elements of each parameter, in the model's order.
        params_of: Module -> numbers of the parameters it owns.
        events: One whole forward and backward pass, recomputed modules included.
        world_size: Number of ranks.
        settings: Limits.
    """
    if world_size == 1:
        return [0] * len(events)
    persistent = settings.persistent(numels)
    always = sum(numels[p] for p in persistent)
    state = _Coordinator(numels, params_of, events, world_size, settings, persistent)
    found = []
    for event in events:
        state.most = state.held
        if event.action == "fetch":
            state.fetch(event.module)
        else:
            state.release(event.module)
        found.append(always + state.most)
    return found

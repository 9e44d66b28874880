"""Everything a rank puts into a checkpoint, as it stands between two steps.

What training changes in place is copied to host memory, so that it may go on while the files are
written: master weights and both moments of every trained element. Small things are turned into
their bytes at once: count of optimizer steps, random states, the method's own state. The rest of
what resume needs never changes in place: place in the data, step and window of the guard stand in
``RunState``, the learning rate follows from the step, plan and skip list have files of their own.
"""

from __future__ import annotations

import base64
import io
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from forgetscale.checkpoint.states import live_states, states_chunks, states_file
from forgetscale.checkpoint.writing import Chunks
from forgetscale.zero3 import ZeroEngine

METHOD_FILE = "method.pt"


def rng_state() -> dict[str, Any]:
    """Return the state of all random generators of this process, for JSON."""
    version, internal, gauss = random.getstate()
    return {
        "python": [version, list(internal), gauss],
        "torch": base64.b64encode(bytes(torch.get_rng_state().tolist())).decode(),
        "cuda": [
            base64.b64encode(bytes(state.tolist())).decode()
            for state in (torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])
        ],
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Put back what ``rng_state`` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(torch.tensor(list(base64.b64decode(state["torch"])), dtype=torch.uint8))
    if torch.cuda.is_available() and state["cuda"]:
        states = [torch.tensor(list(base64.b64decode(s)), dtype=torch.uint8) for s in state["cuda"]]
        torch.cuda.set_rng_state_all(states)


def rng_file(rank: int) -> str:
    """Return the name of the file with a rank's random states."""
    return f"rng/rank-{rank:05d}.json"


def states_bytes(engine: ZeroEngine) -> int:
    """Return the bytes of this rank's masters and moments."""
    return sum(t.numel() * t.element_size() for t in live_states(engine).values())


def free_host_memory() -> int | None:
    """Return the bytes of host memory that may still be taken, None where nothing tells.

    The smaller of what the machine has left and what the control group of this job allows.
    """
    found = []
    memory = Path("/proc/meminfo")
    if memory.is_file():
        lines = memory.read_text(encoding="ascii").splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    group = Path("/sys/fs/cgroup")
    limit, used = group / "memory.max", group / "memory.current"
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()) != "max":
        found.append(int(text) - int(used.read_text()))
    return min(found, default=None)


class HostCopies:
    """Copies of the states in host memory; their room is kept from save to save.

    The room is page-locked where there is a GPU: copying then runs at the full speed of the bus.
    """

    def __init__(self) -> None:
        self._room: dict[str, Tensor] = {}

    @property
    def made(self) -> bool:
        """True once the room is there."""
        return bool(self._room)

    @property
    def num_bytes(self) -> int:
        """Bytes of the copies, without what an allocator rounds up."""
        return sum(room.numel() * room.element_size() for room in self._room.values())

    def take(self, engine: ZeroEngine) -> dict[str, Tensor]:
        """Copy this rank's masters and moments; overwrites the copies of the save before."""
        live = live_states(engine)
        locked = torch.cuda.is_available()
        for name, values in live.items():
            if name not in self._room:
                self._room[name] = torch.empty(
                    values.shape, dtype=values.dtype, device="cpu", pin_memory=locked
                )
            self._room[name].copy_(values, non_blocking=locked)
        if locked:
            torch.cuda.synchronize()
        return {name: self._room[name] for name in live}


def files_of(
    engine: ZeroEngine, method_state: Mapping[str, Any], copies: HostCopies | None
) -> dict[str, Chunks]:
    """Return the files this rank writes, by relative name.

    Args:
        engine: The model, between two steps.
        method_state: The method's own state; rank 0 writes it.
        copies: Where the states are copied to; None leaves the live ones in the result, which then
            must be written before the next step.
    """
    world = engine.world
    tensors = live_states(engine) if copies is None else copies.take(engine)
    rng = json.dumps(rng_state()).encode()
    half = len(rng) // 2
    files: dict[str, Chunks] = {
        states_file(world.rank, world.size): states_chunks(engine, tensors),
        rng_file(world.rank): [rng[:half], rng[half:]],
    }
    if world.is_main:
        buffer = io.BytesIO()
        torch.save(dict(method_state), buffer)
        data = buffer.getvalue()
        files[METHOD_FILE] = [data[: len(data) // 2], data[len(data) // 2 :]]
    return files

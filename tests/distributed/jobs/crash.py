"""Jobs that end a training run at a chosen point, by signal or by a failing disk."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import threading
import time
from collections import namedtuple
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist

import forgetscale.checkpoint.store as store
import forgetscale.engine.ladder as ladder
import forgetscale.engine.loop as loop
import forgetscale.engine.run as run
import forgetscale.points as points
import forgetscale.zero3.shards as shards
from forgetscale.cli import main
from forgetscale.data import TokenStream
from forgetscale.engine.metrics import MetricsLog
from forgetscale.zero3 import World
from tests.distributed.jobs import INSTANT, flip_bit
from tests.distributed.jobs.training import command


def die() -> None:
    """End this process the way ``kill -9`` does."""
    os.kill(os.getpid(), signal.SIGKILL)


class Countdown:
    """Call ``action`` at the n-th event, before or after the original."""

    def __init__(self, number: int, action: Callable[[], None], rank: int | None) -> None:
        self.left = number
        self.action = action
        self.rank = rank

    def __call__(self) -> None:
        self.left -= 1
        if self.left == 0 and self.rank in (None, dist.get_rank()):
            self.action()


def before(event: Callable[[], None], original: Any, when: Callable[..., bool]) -> Any:
    """Wrap ``original``: the event happens first."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if when(*args):
            event()
        return original(*args, **kwargs)

    return wrapped


def after(event: Countdown, original: Any, when: Callable[..., bool]) -> Any:
    """Wrap ``original``: the event happens last."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        if when(*args):
            event()
        return result

    return wrapped


def always(*args: Any) -> bool:
    return True


# name -> (object, attribute, before or after, when)
PLACES: dict[str, tuple[Any, str, Any, Any]] = {
    "in a step, before the optimizer": (shards.ZeroShards, "freeze", before, always),
    "in a step, after the optimizer": (loop, "_log_step", before, always),
    "between step and save": (loop, "_save", before, always),
    "going back, before rows are in quarantine": (ladder, "quarantine", before, always),
    "going back, before later checkpoints go": (
        store.CheckpointStore,
        "remove_after",
        before,
        always,
    ),
    "going back, before the states are loaded": (store.CheckpointStore, "load", before, always),
}


def is_about(path: Path, what: str) -> bool:
    """Return whether a point of a protocol is about a kind of file, or any of a checkpoint."""
    if what == "plan":
        return any(part.startswith(".plan.") for part in path.parts[-2:])
    if "checkpoints" not in path.parts:
        return False
    kinds = {
        "states": path.name.startswith("states-"),
        "rng": path.parent.name == "rng",
        "method": path.name == "method.pt",
        "manifest": path.name == "manifest.json",
        "latest": path.name == "latest",
        "": True,
    }
    return kinds[what]


def remove_some(path: Path) -> None:
    """Remove some files of a folder that is being removed, then die."""
    for file in sorted(p for p in path.rglob("*") if p.is_file())[:2]:
        file.unlink()
    die()


def _raise(number: int, path: Path) -> None:
    raise OSError(number, os.strerror(number), str(path))


ACTIONS: dict[str, Callable[[Path], None]] = {
    "kill": lambda path: die(),
    "kill in the middle of the removal": remove_some,
    "ENOSPC": lambda path: _raise(errno.ENOSPC, path),
    "EIO": lambda path: _raise(errno.EIO, path),
    "bit flip": flip_bit,
    "lost tail": lambda path: os.truncate(path, path.stat().st_size // 2),
}


def train_to_point(
    recipe: dict, label: str, what: str, action: str, number: int, rank: int | None = None
) -> None:
    """Train; at the ``number``-th passing of a labelled point something happens.

    Args:
        recipe: The recipe.
        label: One of ``forgetscale.points.LABELS``.
        what: Kind of file the point must be about, see ``is_about``.
        action: One of ``ACTIONS``.
        number: Which passing, counted on each rank.
        rank: On which rank, None for all.
    """
    left = number

    def hook(found: str, path: Path) -> None:
        nonlocal left
        if found == label and is_about(path, what):
            left -= 1
            if left == 0 and rank in (None, dist.get_rank()):
                ACTIONS[action](path)

    points.set_hook(hook)
    command(recipe)


def train_and_list(recipe: dict) -> list[str]:
    """Train; return which labelled points were passed, in order."""
    found: list[str] = []
    points.set_hook(lambda label, path: found.append(label) if is_about(path, "") else None)
    command(recipe)
    return found


def train_until(recipe: dict, point: str, number: int, rank: int | None = None) -> None:
    """Train and die at the ``number``-th time a place is reached (on one rank, or on all)."""
    target, name, wrap, when = PLACES[point]
    event = Countdown(number, die, rank)
    with mock.patch.object(target, name, wrap(event, getattr(target, name), when)):
        command(recipe)


def train_with_full_disk(recipe: dict, number: int, rank: int | None, how: str) -> None:
    """Train; at the ``number``-th save the disk is full.

    Args:
        recipe: The recipe.
        number: Which save fails.
        rank: Rank on which it fails, None for all.
        how: ``limit`` (the system takes a part of a large file, then refuses) or ``free`` (the
            system reports no free space).
    """
    usage = namedtuple("usage", "total used free")
    left = number
    with ExitStack() as stack:

        def hook(label: str, path: Path) -> None:
            nonlocal left
            left -= label == "save: begun"
            if left or label != "save: begun" or rank not in (None, dist.get_rank()):
                return
            if how == "limit":
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
            else:
                stack.enter_context(
                    mock.patch.object(shutil, "disk_usage", lambda path: usage(10, 10, 0))
                )

        points.set_hook(hook)
        command(recipe)


def train_and_signal(recipe: dict, step: int, rank: int, number: int) -> None:
    """Train; one rank gets a signal in the middle of a step."""
    event = Countdown(step, lambda: os.kill(os.getpid(), number), rank)
    original = shards.ZeroShards.non_finite
    with mock.patch.object(shards.ZeroShards, "non_finite", before(event, original, always)):
        command(recipe)


def train_for(recipe: dict, seconds: float) -> None:
    """Train and die after some time, wherever the run then stands."""
    timer = threading.Timer(seconds, die)
    timer.daemon = True
    timer.start()
    command(recipe)
    timer.cancel()


def time_loop(recipe: dict) -> float:
    """Train; return how long all steps and saves took, without the start and the export."""
    seconds = []

    def timed(job: loop.Training) -> Any:
        begun = time.monotonic()
        state = original(job)
        seconds.append(time.monotonic() - begun)
        return state

    original = run.train_loop
    with mock.patch.object(run, "train_loop", timed):
        command(recipe)
    return sum(seconds)


def train_into_loop(recipe: dict, seconds: float) -> None:
    """Train and die some time after the first step began, unless the last save is done by then.

    Says before it dies which step was the last one done and which labelled point was passed last.
    """
    last = "no point yet"

    def hook(label: str, path: Path) -> None:
        nonlocal last
        last = label

    def timed(job: loop.Training) -> Any:
        def end() -> None:
            os.write(1, f"{INSTANT}{job.state.step}, {last}\n".encode())
            die()

        timer = threading.Timer(seconds, end)
        timer.daemon = True
        timer.start()
        try:
            return original(job)
        finally:
            timer.cancel()

    original = run.train_loop
    points.set_hook(hook)
    with mock.patch.object(run, "train_loop", timed):
        command(recipe)


def train_for_and_signal(arguments: list[str], step: int) -> None:
    """Run a command line; the process gets SIGUSR1 in the middle of a step."""
    event = Countdown(step, lambda: os.kill(os.getpid(), signal.SIGUSR1), 0)
    original = shards.ZeroShards.non_finite
    with mock.patch.object(shards.ZeroShards, "non_finite", before(event, original, always)):
        raise SystemExit(main(arguments))


def signal_when(arguments: list[str], when: str, number: int, what: int = signal.SIGUSR1) -> None:
    """Run a command line; one rank gets a signal before the ``number``-th poll of a phase."""
    event = Countdown(number, lambda: os.kill(os.getpid(), what), dist.get_world_size() - 1)
    original = World.stop_if_asked
    of_phase = before(event, original, lambda world, found: found == when)
    with mock.patch.object(World, "stop_if_asked", of_phase):
        raise SystemExit(main(arguments))


def full_disk_for_metrics(arguments: list[str], step: int) -> None:
    """Run a command line; from some step on no line of metrics can be written."""

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")

    event = Countdown(step, full, 0)
    original = MetricsLog._append
    with mock.patch.object(MetricsLog, "_append", before(event, original, always)):
        raise SystemExit(main(arguments))


def _wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError("training waits for the disk")
        time.sleep(0.005)


def train_with_slow_disk(recipe: dict, step: int) -> None:
    """Train; the first checkpoint is not written before a later step is done. Then die."""
    steps = 0

    def logged(*args: Any) -> None:
        nonlocal steps
        steps += 1
        original(*args)

    def hook(label: str, path: Path) -> None:
        if label == "file: opened" and is_about(path, "states"):
            _wait_for(lambda: steps >= step)
        if label == "save: published":
            die()

    original = loop._log_step
    points.set_hook(hook)
    with mock.patch.object(loop, "_log_step", logged):
        command(recipe)


def train_with_disk_slower_than_saves(recipe: dict, saves: int) -> None:
    """Train; no checkpoint but the last is written before the next is asked for."""
    asked = opened = 0

    def hook(label: str, path: Path) -> None:
        nonlocal asked, opened
        asked += label == "save: asked"
        if label == "file: opened" and is_about(path, "states"):
            opened += 1
            _wait_for(lambda: asked > opened or opened == saves)

    points.set_hook(hook)
    command(recipe)


def train_with_little_memory(recipe: dict) -> None:
    """Train where the node has no host memory left for copies of the states."""
    with mock.patch.object(store, "free_host_memory", lambda: 1000):
        command(recipe)


def hang(recipe: dict, step: int, rank: int) -> None:
    """Train; one rank gets no rows for a step and waits for ever."""

    def stuck() -> None:
        time.sleep(1000)

    original = TokenStream.__next__
    event = Countdown(step, stuck, rank)
    with mock.patch.object(TokenStream, "__next__", before(event, original, always)):
        command(recipe)


def lag(recipe: dict, seconds: float, rank: int) -> None:
    """Train; one rank gets its rows late in every step."""

    def late() -> None:
        if dist.get_rank() == rank:
            time.sleep(seconds)

    original = TokenStream.__next__
    with mock.patch.object(TokenStream, "__next__", before(late, original, always)):
        command(recipe)

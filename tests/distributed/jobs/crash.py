"""Jobs that end a training run at a chosen point, by signal or by a failing disk."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import threading
from collections import namedtuple
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist

import forgetscale.artifact as artifact
import forgetscale.checkpoint.store as store
import forgetscale.engine.loop as loop
import forgetscale.zero3.shards as shards
from forgetscale.cli import main
from forgetscale.engine.metrics import MetricsLog
from forgetscale.zero3 import World
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


def before(event: Countdown, original: Any, when: Callable[..., bool]) -> Any:
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


def is_manifest(path: Path, value: Any) -> bool:
    return path.name == "manifest.json" and ".step-" in path.parent.name


def is_plan_manifest(path: Path, value: Any) -> bool:
    return path.name == "manifest.json" and ".plan." in path.parent.name


def is_latest(path: Path, value: Any) -> bool:
    return path.name == "latest"


def is_old_step(path: Path, *args: Any) -> bool:
    return path.name.endswith(".old")


def remove_half(path: Path, *args: Any, **kwargs: Any) -> None:
    """Remove some files of a folder, then die."""
    for file in sorted(p for p in path.rglob("*") if p.is_file())[:2]:
        file.unlink()
    die()


# name -> (object, attribute, before or after, when)
POINTS: dict[str, tuple[Any, str, Any, Any]] = {
    "in a step, before the optimizer": (shards.ZeroShards, "freeze", before, always),
    "in a step, after the optimizer": (loop, "_log_step", before, always),
    "between step and save": (loop, "_save", before, always),
    "save: before the first file": (store.CheckpointStore, "_write", before, always),
    "save: after the ranks' states": (store, "save_states", after, always),
    "save: before hashing": (store.CheckpointStore, "_flush", before, always),
    "save: before the manifest": (artifact, "write_json", before, is_manifest),
    "save: after the manifest": (artifact, "write_json", after, is_manifest),
    "save: after the rename": (store, "write_json", before, is_latest),
    "save: after latest": (store, "write_json", after, is_latest),
    "save: half of the old one removed": (shutil, "rmtree", before, is_old_step),
    "plan: before its manifest": (artifact, "write_json", before, is_plan_manifest),
}


def train_until(recipe: dict, point: str, number: int, rank: int | None = None) -> None:
    """Train and die at the ``number``-th time a point is reached (on one rank, or on all)."""
    target, name, wrap, when = POINTS[point]
    original = getattr(target, name)
    action = die
    if point == "save: half of the old one removed":
        original = remove_half
        action = bool
    event = Countdown(number, action, rank)
    with mock.patch.object(target, name, wrap(event, original, when)):
        command(recipe)


def train_with_full_disk(recipe: dict, number: int, rank: int | None, how: str) -> None:
    """Train; at the ``number``-th save the disk is full.

    Args:
        recipe: The recipe.
        number: Which save fails.
        rank: Rank on which it fails, None for all.
        how: ``limit`` (the system refuses large files), ``python`` (ENOSPC when RNG states are
            written), ``free`` (the system reports no free space) or ``fsync``.
    """
    original = store.CheckpointStore._write
    usage = namedtuple("usage", "total used free")

    def fill() -> None:
        if how == "limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        elif how == "python":
            stack.enter_context(mock.patch.object(Path, "write_text", full))
        elif how == "fsync":
            stack.enter_context(mock.patch.object(store, "fsync_path", full))

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with ExitStack() as stack:
        if how == "free":
            event = Countdown(
                number,
                lambda: stack.enter_context(
                    mock.patch.object(shutil, "disk_usage", lambda path: usage(10, 10, 0))
                ),
                rank,
            )
            begin = store.CheckpointStore._begin
            stack.enter_context(
                mock.patch.object(store.CheckpointStore, "_begin", before(event, begin, always))
            )
        else:
            event = Countdown(number, fill, rank)
            stack.enter_context(
                mock.patch.object(store.CheckpointStore, "_write", before(event, original, always))
            )
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


def train_for_and_signal(arguments: list[str], step: int) -> None:
    """Run a command line; the process gets SIGUSR1 in the middle of a step."""
    event = Countdown(step, lambda: os.kill(os.getpid(), signal.SIGUSR1), 0)
    original = shards.ZeroShards.non_finite
    with mock.patch.object(shards.ZeroShards, "non_finite", before(event, original, always)):
        raise SystemExit(main(arguments))


def signal_when(arguments: list[str], when: str, number: int) -> None:
    """Run a command line; one rank gets SIGUSR1 before the ``number``-th poll of a phase."""
    event = Countdown(
        number, lambda: os.kill(os.getpid(), signal.SIGUSR1), dist.get_world_size() - 1
    )
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

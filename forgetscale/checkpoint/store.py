"""Checkpoints: published whole, hashed, verified before use.

Saving: agree on free space; copy to host memory what training changes in place (the only part that
training waits for); then every rank writes its files below a temporary name, flushes them, reads
them back and hashes them, in a thread that talks to nobody. At a later step boundary the ranks
agree that all have ended: rank 0 writes the manifest and renames the folder, or all stop with the
error of the one that failed. ``latest`` is a hint. Old checkpoints go only after the new one is in
place. Loading: the newest folder whose manifest and hashes are right, the same on all ranks; a bad
one is renamed to ``.bad`` and the one before is tried. Masters and moments are in
``forgetscale.checkpoint.states``'s own files.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from forgetscale.artifact import (
    list_files,
    publish,
    read_manifest,
    verify_artifact,
    write_json,
)
from forgetscale.checkpoint.records import RunState, SaveReport
from forgetscale.checkpoint.snapshot import (
    METHOD_FILE,
    HostCopies,
    files_of,
    free_host_memory,
    rng_file,
    set_rng_state,
    states_bytes,
)
from forgetscale.checkpoint.states import load_states
from forgetscale.checkpoint.writing import Files, Work
from forgetscale.errors import CheckpointError, DataError, ForgetScaleError
from forgetscale.masks import FreezePlan
from forgetscale.points import reach
from forgetscale.zero3 import World, ZeroEngine

KIND = "checkpoint"
_STEP_NAME = re.compile(r"step-(\d{8})")
SPACE_FACTOR, SPACE_MARGIN = 1.2, 1_000_000
_FIRST_POLL, _LONGEST_POLL = 0.002, 0.5


@dataclass(slots=True)
class _Pending:
    state: RunState
    temporary: Path
    work: Work
    files: Files
    begun: float
    num_bytes: int
    in_background: bool
    stall_seconds: float
    waited_seconds: float


class CheckpointStore:
    """The ``checkpoints/`` folder of a run.

    Args:
        directory: ``RUN/checkpoints``.
        world: This process among all.
        keep: Newest verified checkpoints kept, >= 2.
        recipe: Resolved recipe, recorded in each manifest.
        log: Receives one line per event.
        background: Write beside training; False lets training wait for every save.
        note: Receives the report of each published checkpoint, on rank 0.

    Attributes:
        num_waits: Saves that had to wait for the one before them.
        pinned: Steps whose checkpoints are kept beside the newest ones.
    """

    def __init__(
        self,
        directory: Path,
        world: World,
        *,
        keep: int,
        recipe: Mapping[str, Any],
        log: Callable[[str], None],
        background: bool = True,
        note: Callable[[SaveReport], None] | None = None,
    ) -> None:
        self._directory = directory
        self._world = world
        self._keep = keep
        self._recipe = recipe
        self._log = log
        self._copies = HostCopies() if background else None
        self._note = note
        self._pending: _Pending | None = None
        self._pruning: Work | None = None
        self._reports: list[SaveReport] = []
        self.num_waits = 0
        self.pinned: frozenset[int] = frozenset()

    def steps(self) -> list[int]:
        """Return the steps of the folders that carry a checkpoint's name, ascending."""
        if not self._directory.is_dir():
            return []
        found = [_STEP_NAME.fullmatch(path.name) for path in self._directory.iterdir()]
        return sorted(int(match[1]) for match in found if match)

    def path(self, step: int) -> Path:
        """Return the folder of a step."""
        return self._directory / f"step-{step:08d}"

    def _on_main(self, work: Callable[[], Any]) -> Any:
        error: BaseException | None = None
        result = None
        if self._world.is_main:
            try:
                result = work()
            except (OSError, ForgetScaleError) as found:
                error = found
        self._world.agree(self._wrapped(error))
        return self._world.broadcast(result)

    def _wrapped(self, error: BaseException | None) -> ForgetScaleError | None:
        if error is None or isinstance(error, ForgetScaleError):
            return error
        what = str(error) if isinstance(error, OSError | RuntimeError) else repr(error)
        wrapped = CheckpointError(
            f"rank {self._world.rank} cannot write the checkpoint in {self._directory}: {what};"
            " the checkpoint before it is intact; free space or mend the file system, then start"
            " the same command again."
        )
        wrapped.__cause__ = error
        return wrapped

    # ---- saving -------------------------------------------------------------------------

    def sweep(self) -> None:
        """Remove leftovers of saves that were cut short. Collective: every rank must call it."""

        def remove() -> None:
            for path in self._directory.glob(".step-*"):
                self._log(f"checkpoint: removing unfinished {path.name}")
                shutil.rmtree(path)
            for path in self._directory.glob(".latest.tmp-*"):
                path.unlink()

        self._on_main(remove)

    def save(self, state: RunState, engine: ZeroEngine, method_state: Mapping[str, Any]) -> None:
        """Take the states as they are now and let them be written; ``advance`` publishes them.

        Waits for the save before it: there is never more than one under way.

        Collective: every rank must call it, between two steps.

        Raises:
            CheckpointError: Too little space, or a write failed; nothing half-written stays.
        """
        reach("save: asked", self._directory)
        waited = self._wait_for_last()
        begun = time.perf_counter()
        reach("save: begun", self._directory)
        sizes = self._world.gather_objects(states_bytes(engine))
        copies = self._room(sizes)
        final = self.path(state.step)
        temporary = Path(self._on_main(lambda: str(self._begin(final, sum(sizes)))))
        error: BaseException | None = None
        try:
            contents = files_of(engine, method_state, copies)
        except (RuntimeError, MemoryError) as found:
            error = found
        self._agree_or_remove(error, temporary)
        reach("save: states copied", temporary)
        files = Files(temporary, contents)
        work = Work(files.write, background=copies is not None)
        self._pending = _Pending(
            state=state,
            temporary=temporary,
            work=work,
            files=files,
            begun=begun,
            num_bytes=sum(sizes),
            in_background=copies is not None,
            stall_seconds=time.perf_counter() - begun,
            waited_seconds=waited,
        )
        if copies is None:
            self.advance(wait=True)

    def advance(self, *, wait: bool = False) -> None:
        """Publish the save that is under way, if all ranks have written and verified their files.

        Call it at every step boundary: without a save under way it costs nothing, with one the sum
        of two numbers.

        Args:
            wait: Come back only when it is published and what it replaces is removed.

        Collective: every rank must call it.

        Raises:
            CheckpointError: A write failed on some rank; nothing half-written stays.
        """
        pending, pause, before = self._pending, _FIRST_POLL, -1.0
        while pending is not None:
            mine = [float(pending.work.ended), float(pending.files.num_bytes)]
            ended, written = self._world.sum(torch.tensor(mine, dtype=torch.float64)).tolist()
            if wait and written > before:
                self._world.watchdog.alive("writing a checkpoint")
                before = written
            if int(ended) == self._world.size:
                self._pending = None
                self._publish(pending)
                break
            if not wait:
                return
            # No rank sits in a collective while another writes: that would run into its timeout.
            pending.work.wait(pause)
            pause = min(2 * pause, _LONGEST_POLL)
        if wait:
            self._on_main(self._end_pruning)

    def take_reports(self) -> list[SaveReport]:
        """Return the reports of what was published since the last call, on rank 0."""
        reports, self._reports = self._reports, []
        return reports

    def _wait_for_last(self) -> float:
        begun, pending = time.perf_counter(), self._pending
        if pending is not None:
            ended = self._world.sum(torch.tensor([float(pending.work.ended)]))
            self.num_waits += int(ended) < self._world.size
        self.advance(wait=True)
        return 0.0 if pending is None else time.perf_counter() - begun

    def _room(self, sizes: list[int]) -> HostCopies | None:
        """Return where to copy to; None, with a line in the log, if the nodes lack the memory."""
        if self._copies is None or self._copies.made:
            return self._copies
        # Page-locked room is handed out in powers of two.
        factor = 2 if torch.cuda.is_available() else 1
        needed = factor * max(sizes) * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        free = free_host_memory()
        lacks = [
            (rank, found)
            for rank, found in enumerate(self._world.gather_objects(free))
            if found is not None and found < needed
        ]
        if lacks:
            rank, found = lacks[0]
            self._log(
                f"checkpoint: the node of rank {rank} has {found / 1e9:.1f} GB of host memory left,"
                f" copies need {needed / 1e9:.1f} GB: training waits for this and every other save"
            )
            self._copies = None
        return self._copies

    def _agree_or_remove(self, error: BaseException | None, temporary: Path) -> None:
        try:
            self._world.agree(self._wrapped(error))
        except ForgetScaleError:
            if self._world.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
            raise

    def _publish(self, pending: _Pending) -> None:
        self._agree_or_remove(pending.work.error, pending.temporary)
        begun = time.perf_counter()
        parts = self._world.gather_objects(pending.files.hashes)
        known = {name: digest for part in parts for name, digest in part.items()}
        try:
            self._on_main(lambda: self._commit(pending, known))
        except ForgetScaleError:
            if self._world.is_main:
                shutil.rmtree(pending.temporary, ignore_errors=True)
            raise
        ended = time.perf_counter()
        report = SaveReport(
            step=pending.state.step,
            num_bytes=pending.num_bytes,
            in_background=pending.in_background,
            stall_seconds=pending.stall_seconds + ended - begun,
            total_seconds=ended - pending.begun,
            waited_seconds=pending.waited_seconds,
        )
        self._reports.append(report)
        if self._note is not None:
            self._note(report)

    def _begin(self, final: Path, num_bytes: int) -> Path:
        self._directory.mkdir(parents=True, exist_ok=True)
        needed = int(SPACE_FACTOR * num_bytes) + SPACE_MARGIN
        free = shutil.disk_usage(self._directory).free
        if free < needed:
            raise CheckpointError(
                f"{self._directory} has {free / 1e9:.2f} GB free, a checkpoint needs"
                f" {needed / 1e9:.2f} GB; free space and start the same command again."
            )
        temporary = final.with_name(f".{final.name}.tmp-{secrets.token_hex(4)}")
        temporary.mkdir()
        reach("save: folder made", temporary)
        return temporary

    def _commit(self, pending: _Pending, known: Mapping[str, str]) -> None:
        temporary, state = pending.temporary, pending.state
        reach("save: all ranks done", temporary)
        listed = {path.relative_to(temporary).as_posix() for path in list_files(temporary)}
        if differing := sorted(listed ^ set(known)):
            raise CheckpointError(
                f"{temporary / differing[0]} was written by one rank but is not what rank 0 sees;"
                " run.output_dir must lie on a file system that all nodes share."
            )
        publish(
            temporary,
            self.path(state.step),
            kind=KIND,
            payload=asdict(state),
            inputs={"data": state.data_hash, "model": state.model_hash},
            recipe=self._recipe,
            known_hashes=known,
        )
        write_json(self._directory / "latest", {"step": state.step})
        reach("save: published", self._directory)
        self._end_pruning()
        self._pruning = Work(self._prune, background=pending.in_background)
        if not pending.in_background:
            self._end_pruning()

    def _prune(self) -> None:
        for step in self.steps()[: -self._keep]:
            if step in self.pinned:
                continue
            # Renamed first: what a crash leaves of it never looks like a checkpoint.
            old = self.path(step)
            leaving = old.with_name(f".{old.name}.old")
            old.rename(leaving)
            reach("prune: old one renamed", leaving)
            shutil.rmtree(leaving)
            reach("prune: old one removed", leaving)

    def _end_pruning(self) -> None:
        if self._pruning is None:
            return
        self._pruning.wait()
        error, self._pruning = self._pruning.error, None
        if error is not None:
            raise error

    def remove_after(self, step: int) -> None:
        """Remove the checkpoints of later steps. Collective: every rank must call it.

        For a run that goes back: what came later will be made again in another way.
        """

        def remove() -> None:
            self._end_pruning()
            for later in [found for found in self.steps() if found > step]:
                leaving = self.path(later).with_name(f".{self.path(later).name}.undone")
                self.path(later).rename(leaving)
                shutil.rmtree(leaving)

        self._on_main(remove)

    # ---- loading ------------------------------------------------------------------------

    def find(self, *, before: int | None = None) -> RunState | None:
        """Return the state of the newest checkpoint that verifies, or None if there is none.

        A folder that fails is renamed to ``.bad-...`` and the one before it is tried. Ranks share
        the hashing and agree on the outcome. Collective: every rank must call it.

        Args:
            before: Look only at checkpoints of earlier steps than this; None looks at all.

        Raises:
            CheckpointError: There are checkpoints but none is good, or the file system fails;
                starting from nothing in silence would throw the run away.
        """
        steps = self._world.broadcast(self.steps())
        if before is not None:
            steps = [step for step in steps if step < before]
        for step in reversed(steps):
            path = self.path(step)
            problem = None
            error: OSError | None = None
            manifest: dict[str, Any] = {}
            try:
                manifest = read_manifest(path, KIND)
                share = sorted(manifest["files"])[self._world.rank :: self._world.size]
                verify_artifact(path, KIND, only=share, closed=True)
            except DataError as found:
                problem = str(found)
            except OSError as found:
                error = found
            self._world.agree(self._unreadable(path, error))
            problems = [text for text in self._world.gather_objects(problem) if text]
            if not problems:
                return RunState(**manifest["payload"])
            self._log(f"checkpoint: step {step} is damaged and set aside: {problems[0]}")
            self._set_aside(path)
        if steps:
            raise CheckpointError(
                f"all {len(steps)} checkpoints in {self._directory} are damaged (set aside as"
                " .bad); remove the folder to start the run from its beginning."
            )
        return None

    def _unreadable(self, path: Path, error: OSError | None) -> CheckpointError | None:
        if error is None:
            return None
        return CheckpointError(
            f"rank {self._world.rank} cannot read {path}: {error}; mend the file system and start"
            " the same command again."
        )

    def _set_aside(self, path: Path) -> None:
        aside = path.with_name(f"{path.name}.bad-{secrets.token_hex(4)}")
        self._on_main(lambda: str(path.rename(aside)))

    def load(self, state: RunState, engine: ZeroEngine, plan: FreezePlan | None) -> dict[str, Any]:
        """Load a verified checkpoint into the engine; return the method's state.

        The number of ranks and the layout of the plan may differ from those that wrote it.

        Args:
            state: From ``find``.
            engine: The model, holding the source model's weights.
            plan: Freeze plan in names of the source model.

        Raises:
            CheckpointError: The files do not fit the model or the plan.

        Collective: every rank must call it.
        """
        path = self.path(state.step)
        load_states(path, state.world_size, engine, plan)
        rng = path / rng_file(self._world.rank)
        if rng.is_file():  # a rank that was not there before keeps the state it started with
            set_rng_state(json.loads(rng.read_text(encoding="utf-8")))
        found = torch.load(path / METHOD_FILE, weights_only=True)
        assert isinstance(found, dict)
        return found

"""Checkpoints: published whole, hashed, verified before use.

Saving: agree on free space; every rank writes below a temporary name; every file is hashed and
flushed by some rank; rank 0 writes the manifest and renames the folder; ``latest`` is a hint.
Old checkpoints go only after the new one is in place. Loading: the newest folder whose manifest and
hashes are right, the same on all ranks; a bad one is renamed to ``.bad`` and the one before is
tried. Masters and moments are in ``forgetscale.checkpoint.states``'s own files.
"""

from __future__ import annotations

import base64
import json
import random
import re
import secrets
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from forgetscale.artifact import (
    fsync_path,
    hash_file,
    list_files,
    publish,
    read_manifest,
    verify_artifact,
    write_json,
)
from forgetscale.checkpoint.states import load_states, save_states
from forgetscale.errors import CheckpointError, DataError, ForgetScaleError
from forgetscale.masks import FreezePlan
from forgetscale.zero3 import World, ZeroEngine

KIND = "checkpoint"
METHOD_FILE = "method.pt"
_STEP_NAME = re.compile(r"step-(\d{8})")
SPACE_FACTOR = 1.2


@dataclass(frozen=True, slots=True)
class RunState:
    """Where a run stands; together with the ranks' states it is all that resume needs."""

    step: int
    """Optimizer steps done."""
    cursor: int
    """Rows of the stream consumed by all ranks."""
    target_tokens: int
    """Target tokens seen by all ranks."""
    world_size: int
    """Ranks that wrote the checkpoint."""
    data_hash: str
    """Content hash of the token set."""
    plan_hash: str | None
    """Content hash of the freeze plan."""
    model_hash: str
    """Content hash of the source model."""


def _rng_state() -> dict[str, Any]:
    version, internal, gauss = random.getstate()
    return {
        "python": [version, list(internal), gauss],
        "torch": base64.b64encode(bytes(torch.get_rng_state().tolist())).decode(),
        "cuda": [
            base64.b64encode(bytes(state.tolist())).decode()
            for state in (torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])
        ],
    }


def _set_rng_state(state: Mapping[str, Any]) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(torch.tensor(list(base64.b64decode(state["torch"])), dtype=torch.uint8))
    if torch.cuda.is_available() and state["cuda"]:
        states = [torch.tensor(list(base64.b64decode(s)), dtype=torch.uint8) for s in state["cuda"]]
        torch.cuda.set_rng_state_all(states)


class CheckpointStore:
    """The ``checkpoints/`` folder of a run.

    Args:
        directory: ``RUN/checkpoints``.
        world: This process among all.
        keep: Newest verified checkpoints kept, >= 2.
        recipe: Resolved recipe, recorded in each manifest.
        log: Receives one line per event.
    """

    def __init__(
        self,
        directory: Path,
        world: World,
        *,
        keep: int,
        recipe: Mapping[str, Any],
        log: Callable[[str], None],
    ) -> None:
        self._directory = directory
        self._world = world
        self._keep = keep
        self._recipe = recipe
        self._log = log

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
        return CheckpointError(
            f"rank {self._world.rank} cannot write the checkpoint in {self._directory}: {error};"
            " the checkpoint before it is intact; free space or mend the file system, then start"
            " the same command again."
        )

    # ---- saving -------------------------------------------------------------------------

    def sweep(self) -> None:
        """Remove leftovers of saves that were cut short. Collective: every rank must call it."""

        def remove() -> None:
            for path in self._directory.glob(".step-*"):
                self._log(f"checkpoint: removing unfinished {path.name}")
                shutil.rmtree(path)

        self._on_main(remove)

    def save(self, state: RunState, engine: ZeroEngine, method_state: Mapping[str, Any]) -> Path:
        """Write and publish a checkpoint.

        Collective: every rank must call it.

        Raises:
            CheckpointError: Too little space, or a write failed; nothing half-written stays.
        """
        final = self.path(state.step)
        temporary = Path(self._on_main(lambda: str(self._begin(final))))
        error: BaseException | None = None
        hashes: dict[str, str] = {}
        try:
            try:
                files = self._write(temporary, engine, method_state)
                hashes = self._flush(temporary, files)
            except (OSError, RuntimeError) as found:
                error = found
            self._world.agree(self._wrapped(error))
            parts = self._world.gather_objects(hashes)
            known = {name: digest for part in parts for name, digest in part.items()}
            self._on_main(lambda: self._commit(temporary, final, state, known))
        except ForgetScaleError:
            if self._world.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        return final

    def _begin(self, final: Path) -> Path:
        self._directory.mkdir(parents=True, exist_ok=True)
        needed = 0
        if done := self.steps():
            files = list_files(self.path(done[-1]))
            needed = int(SPACE_FACTOR * sum(path.stat().st_size for path in files))
        free = shutil.disk_usage(self._directory).free
        if free < needed:
            raise CheckpointError(
                f"{self._directory} has {free / 1e9:.2f} GB free, a checkpoint needs"
                f" {needed / 1e9:.2f} GB; free space and start the same command again."
            )
        temporary = final.with_name(f".{final.name}.tmp-{secrets.token_hex(4)}")
        temporary.mkdir()
        return temporary

    def _write(
        self, folder: Path, engine: ZeroEngine, method_state: Mapping[str, Any]
    ) -> list[Path]:
        files = [save_states(folder, engine)]
        (folder / "rng").mkdir(exist_ok=True)
        rng = folder / "rng" / f"rank-{self._world.rank:05d}.json"
        rng.write_text(json.dumps(_rng_state()), encoding="utf-8")
        files.append(rng)
        if self._world.is_main:
            torch.save(dict(method_state), folder / METHOD_FILE)
            files.append(folder / METHOD_FILE)
        return files

    def _flush(self, folder: Path, files: list[Path]) -> dict[str, str]:
        # By the rank that wrote them: another node's cache cannot vouch for a file.
        hashes = {}
        for path in files:
            fsync_path(path)
            hashes[path.relative_to(folder).as_posix()] = hash_file(path)
        return hashes

    def _commit(
        self, temporary: Path, final: Path, state: RunState, known: Mapping[str, str]
    ) -> None:
        listed = {path.relative_to(temporary).as_posix() for path in list_files(temporary)}
        if differing := sorted(listed ^ set(known)):
            raise CheckpointError(
                f"{temporary / differing[0]} was written by one rank but is not what rank 0 sees;"
                " run.output_dir must lie on a file system that all nodes share."
            )
        publish(
            temporary,
            final,
            kind=KIND,
            payload=asdict(state),
            inputs={"data": state.data_hash, "model": state.model_hash},
            recipe=self._recipe,
            known_hashes=known,
        )
        write_json(self._directory / "latest", {"step": state.step})
        for step in self.steps()[: -self._keep]:
            # Renamed first: what a crash leaves of it never looks like a checkpoint.
            old = self.path(step)
            leaving = old.with_name(f".{old.name}.old")
            old.rename(leaving)
            shutil.rmtree(leaving)

    # ---- loading ------------------------------------------------------------------------

    def find(self) -> RunState | None:
        """Return the state of the newest checkpoint that verifies, or None if there is none.

        A folder that fails is renamed to ``.bad-...`` and the one before it is tried. Ranks share
        the hashing and agree on the outcome. Collective: every rank must call it.

        Raises:
            CheckpointError: There are checkpoints but none is good, or the file system fails;
                starting from nothing in silence would throw the run away.
        """
        steps = self._world.broadcast(self.steps())
        for step in reversed(steps):
            path = self.path(step)
            problem = None
            error: OSError | None = None
            manifest: dict[str, Any] = {}
            try:
                manifest = read_manifest(path, KIND)
                share = sorted(manifest["files"])[self._world.rank :: self._world.size]
                verify_artifact(path, KIND, only=None if self._world.size == 1 else share)
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
        rng = path / "rng" / f"rank-{self._world.rank:05d}.json"
        if rng.is_file():  # a rank that was not there before keeps the state it started with
            _set_rng_state(json.loads(rng.read_text(encoding="utf-8")))
        found = torch.load(path / METHOD_FILE, weights_only=True)
        assert isinstance(found, dict)
        return found

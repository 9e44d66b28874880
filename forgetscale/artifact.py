"""Artefact folders: all or nothing, hashed, with provenance.

An artefact is a folder whose ``manifest.json`` is written last. A folder without a valid manifest
does not exist for this project. Publishing goes: temporary sibling folder, fsync of each file,
manifest, fsync of the folder, rename, fsync of the parent. A crash at any point leaves either the
old state or the new one; a stale temporary folder is never read.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from forgetscale.errors import DataError
from forgetscale.points import reach

MANIFEST_NAME = "manifest.json"
SCHEMA_VERSION = 1
_RECORDED_PACKAGES = (
    "forgetscale",
    "torch",
    "deepspeed",
    "transformers",
    "datasets",
    "sentencepiece",
    "pyarrow",
    "safetensors",
    "tokenizers",
    "numpy",
)


RECORDED_VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "DS_ACCELERATOR",
    "HF_HUB_OFFLINE",
    "LOCAL_WORLD_SIZE",
    "NCCL_ALGO",
    "NCCL_P2P_DISABLE",
    "NCCL_PROTO",
    "NCCL_SOCKET_IFNAME",
    "NVIDIA_TF32_OVERRIDE",
    "OMP_NUM_THREADS",
    "PYTHONHASHSEED",
    "PYTORCH_ALLOC_CONF",
    "SLURM_CLUSTER_NAME",
    "SLURM_JOB_ID",
    "SLURM_JOB_NUM_NODES",
    "SLURM_JOB_PARTITION",
    "SLURM_RESTART_COUNT",
    "TOKENIZERS_PARALLELISM",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING",
    "WORLD_SIZE",
)
"""Names of environment variables that a record may hold; anything else may be a secret."""
_SECRET_NAME = r"(?:token|secret|passw(?:or)?d|api[_-]?key|credential)"
_NAMED_SECRET = re.compile(rf"(\w*{_SECRET_NAME}(?:_\w*)?\s*[=:]\s*)\S+", re.IGNORECASE)
_URL_PASSWORD = re.compile(r"(\w+://[^/\s:@]*:)[^/\s@]+@")
_TOKEN = re.compile(r"\b(?:hf_|sk-|ghp_|github_pat_|glpat-|xox[abp]-|AKIA)[A-Za-z0-9_-]{10,}")


def canonical_json(value: Any) -> bytes:
    """Return ``value`` as JSON bytes with sorted keys and no spaces, the form that is hashed."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def hash_bytes(data: bytes | memoryview) -> str:
    """Return the SHA-256 of ``data`` as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def hash_file(path: Path) -> str:
    """Return the SHA-256 of the file at ``path`` as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync_path(path: Path) -> None:
    """Flush a file or folder to the disk; an error here means that the write failed."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON so that a reader sees the old file or the whole new one."""
    temporary = path.with_name(f".{path.name}.tmp-{secrets.token_hex(4)}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(value, file, indent=1, ensure_ascii=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        reach("json: written", path)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_path(path.parent)


@functools.cache
def _commit() -> str | None:
    """Return the git commit of this source tree, with ``+changes`` if it differs, or None."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None
    head = subprocess.run(
        ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    if head.returncode != 0:
        return None
    status = subprocess.run(
        ["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no"],
        capture_output=True,
        text=True,
        check=False,
    )
    return head.stdout.strip() + ("+changes" if status.stdout.strip() else "")


@functools.cache
def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _RECORDED_PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _seconds() -> float:
    """Return the time to record: ``SOURCE_DATE_EPOCH`` where set, for reproducible folders."""
    fixed = os.environ.get("SOURCE_DATE_EPOCH", "")
    return float(fixed) if fixed.isdigit() else time.time()


def recorded_day() -> str:
    """Return the day of that time, in UTC, as ``YYYY-MM-DD``."""
    return time.strftime("%Y-%m-%d", time.gmtime(_seconds()))


def redacted(arguments: Iterable[str]) -> list[str]:
    """Return command-line arguments without what looks like a secret."""
    shown = []
    for argument in arguments:
        argument = _URL_PASSWORD.sub(r"\1***@", argument)
        argument = _NAMED_SECRET.sub(r"\1***", argument)
        shown.append(_TOKEN.sub("***", argument))
    return shown


def recorded_environment(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the variables that may be recorded: a fixed list of names, never all of them.

    Args:
        environment: Variables; None takes those of this process.
    """
    found = os.environ if environment is None else environment
    return {name: found[name] for name in RECORDED_VARIABLES if name in found}


def provenance(recipe: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return what made an artefact: command, package versions, commit and resolved recipe."""
    made_by: dict[str, Any] = {
        "command": redacted([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "versions": _versions(),
        "commit": _commit(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(_seconds())),
    }
    if recipe is not None:
        made_by["recipe"] = dict(recipe)
    return made_by


class ArtifactWriter:
    """Context manager that fills a temporary folder and publishes it under its final name.

    Inside the block write files under ``writer.path``; set ``writer.payload`` (what readers need)
    and ``writer.inputs`` (name -> content hash of what it was made from). Leaving the block
    hashes every file, writes the manifest and renames the folder. An exception inside the block
    removes the temporary folder: nothing half-written stays.

    Args:
        directory: Final folder. Must not exist, unless ``replace`` is true.
        kind: What the artefact is, such as ``token_set`` or ``freeze_plan``; checked on reading.
        recipe: Resolved recipe to record, if there is one.
        replace: Swap an existing artefact of the same kind for the new one.

    Raises:
        DataError: The final folder exists (without ``replace``) or is no artefact of this kind.
    """

    def __init__(
        self,
        directory: Path,
        kind: str,
        *,
        recipe: Mapping[str, Any] | None = None,
        replace: bool = False,
    ) -> None:
        self.directory = Path(directory)
        self.kind = kind
        self.payload: dict[str, Any] = {}
        self.inputs: dict[str, str] = {}
        self._recipe = recipe
        self._replace = replace
        self.path = self.directory.with_name(
            f".{self.directory.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}"
        )

    def __enter__(self) -> ArtifactWriter:
        """Create the temporary folder."""
        if self.directory.exists():
            if not self._replace:
                raise DataError(
                    f"{self.directory} exists already; name another output folder or remove it."
                )
            if any(self.directory.iterdir()):
                read_manifest(self.directory, self.kind)
        self.path.mkdir(parents=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Publish on success, remove on failure."""
        if kind is not None:
            shutil.rmtree(self.path, ignore_errors=True)
            return
        try:
            publish(
                self.path,
                self.directory,
                kind=self.kind,
                payload=self.payload,
                inputs=self.inputs,
                recipe=self._recipe,
            )
        except BaseException:
            shutil.rmtree(self.path, ignore_errors=True)
            raise


def list_files(directory: Path) -> list[Path]:
    """Return every file below ``directory`` except the manifest, sorted, refusing links."""
    found = []
    for path in sorted(directory.rglob("*")):
        if path.is_symlink():
            raise DataError(f"{path} is a symbolic link; artefacts hold plain files only.")
        if path.is_file() and path != directory / MANIFEST_NAME:
            found.append(path)
    return found


def publish(
    temporary: Path,
    directory: Path,
    *,
    kind: str,
    payload: Mapping[str, Any],
    inputs: Mapping[str, str],
    recipe: Mapping[str, Any] | None,
    known_hashes: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Write the manifest into ``temporary`` and rename the folder to ``directory``.

    Args:
        temporary: Filled folder beside ``directory`` (same file system).
        directory: Final name; an existing folder there is replaced.
        kind: Kind recorded in the manifest.
        payload: What readers of this kind need.
        inputs: Name -> content hash of what the artefact was made from.
        recipe: Resolved recipe, or None.
        known_hashes: Relative file name -> SHA-256 computed by the writer; others are read here.

    Returns:
        The manifest that was written.
    """
    files: dict[str, dict[str, Any]] = {}
    for path in list_files(temporary):
        name = path.relative_to(temporary).as_posix()
        digest = (known_hashes or {}).get(name) or hash_file(path)
        files[name] = {"size": path.stat().st_size, "sha256": digest}
        fsync_path(path)
    reach("publish: files flushed", temporary)
    manifest: dict[str, Any] = {
        "schema": SCHEMA_VERSION,
        "kind": kind,
        "made_by": provenance(recipe),
        "inputs": dict(inputs),
        "files": files,
        "payload": dict(payload),
    }
    manifest["self_hash"] = hash_bytes(canonical_json(manifest))
    write_json(temporary / MANIFEST_NAME, manifest)
    for folder in sorted(path for path in temporary.rglob("*") if path.is_dir()):
        fsync_path(folder)
    fsync_path(temporary)
    reach("publish: manifest written", temporary)
    directory.parent.mkdir(parents=True, exist_ok=True)
    if directory.exists():
        old = directory.with_name(f".{directory.name}.old-{secrets.token_hex(4)}")
        directory.rename(old)
        temporary.rename(directory)
        shutil.rmtree(old)
    else:
        temporary.rename(directory)
    reach("publish: renamed", directory)
    fsync_path(directory.parent)
    return manifest


def wait_until_visible(directory: Path, self_hash: str, *, seconds: float = 60.0) -> None:
    """Wait until this machine sees a folder that another one has just published.

    Network file systems may remember for a while that a name did not exist.

    Args:
        directory: Published folder.
        self_hash: ``self_hash`` of its manifest, as the writer knows it.
        seconds: Longest wait.

    Raises:
        DataError: It did not appear in time.
    """
    deadline = time.monotonic() + seconds
    while True:
        os.listdir(directory.parent)
        try:
            if read_manifest(directory)["self_hash"] == self_hash:
                return
        except DataError:
            pass
        if time.monotonic() > deadline:
            raise DataError(
                f"{directory} was published by another rank but is not visible here after"
                f" {seconds:.0f} s; it must lie on a file system that all nodes share."
            )
        time.sleep(0.2)


def read_manifest(directory: Path, kind: str | None = None) -> dict[str, Any]:
    """Read and check ``directory/manifest.json`` (not the files it lists).

    Args:
        directory: Artefact folder.
        kind: Expected kind; None accepts any.

    Raises:
        DataError: There is no folder, no manifest, a damaged manifest or another kind.
    """
    directory = Path(directory)
    path = directory / MANIFEST_NAME
    wanted = f"a {kind} artefact" if kind else "an artefact"
    if not directory.is_dir():
        raise DataError(f"{directory} does not exist; expected {wanted}; check the path.")
    if not path.is_file():
        raise DataError(
            f"{directory} has no {MANIFEST_NAME}, so it is not {wanted} or its writing was cut"
            " short; make it again."
        )
    try:
        manifest = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON ({error}); make the artefact again.") from error
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA_VERSION:
        found = manifest.get("schema") if isinstance(manifest, dict) else type(manifest).__name__
        raise DataError(
            f"{path} has schema {found}, expected {SCHEMA_VERSION}; make the artefact again."
        )
    stored = manifest.pop("self_hash", None)
    if stored != hash_bytes(canonical_json(manifest)):
        raise DataError(f"{path} was changed after it was written; make the artefact again.")
    manifest["self_hash"] = stored
    if kind is not None and manifest["kind"] != kind:
        raise DataError(f"{directory} is a {manifest['kind']} artefact, expected {kind}.")
    return manifest


def verify_artifact(
    directory: Path,
    kind: str | None = None,
    *,
    only: Iterable[str] | None = None,
    closed: bool = False,
) -> dict[str, Any]:
    """Check size and SHA-256 of the files an artefact lists, and that there are no others.

    Args:
        directory: Artefact folder.
        kind: Expected kind; None accepts any.
        only: Check these relative names instead of all files.
        closed: Refuse files that are not listed with ``only`` too, and a folder that is a link.

    Returns:
        The manifest.

    Raises:
        DataError: A file is missing, extra or changed; the message names it.
    """
    directory = Path(directory)
    if closed and directory.is_symlink():
        raise DataError(f"{directory} is a symbolic link; put the folder itself there.")
    manifest = read_manifest(directory, kind)
    files = manifest["files"]
    present = {path.relative_to(directory).as_posix() for path in list_files(directory)}
    if (closed or only is None) and (extra := sorted(present - set(files))):
        raise DataError(
            f"{directory / extra[0]} is not listed in the manifest; remove it or make the"
            " artefact again."
        )
    for name in sorted(files if only is None else only):
        entry = files[name]
        path = directory / name
        if name not in present:
            raise DataError(f"{path} is missing; make the artefact again.")
        size = path.stat().st_size
        if size != entry["size"]:
            raise DataError(
                f"{path} has {size} bytes, expected {entry['size']}; make the artefact again."
            )
        if hash_file(path) != entry["sha256"]:
            raise DataError(f"{path} has other content than when it was written (SHA-256 differs).")
    return manifest

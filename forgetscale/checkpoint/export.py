"""Write a partitioned model as an ordinary Hugging Face folder, a bounded part at a time."""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from forgetscale.artifact import (
    fsync_path,
    hash_file,
    publish,
    read_manifest,
    wait_until_visible,
)
from forgetscale.errors import CheckpointError, DataError, ForgetScaleError
from forgetscale.models.weights import INDEX_FILE, SINGLE_FILE
from forgetscale.zero3 import Matrix, World, ZeroEngine

KIND = "model_export"
MAX_FILE_BYTES = 2_000_000_000
_SKIPPED_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}
_SKIPPED_NAMES = {INDEX_FILE, "manifest.json", "pytorch_model.bin.index.json"}
_DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def plan_files(matrices: list[Matrix], max_bytes: int) -> list[list[Matrix]]:
    """Cut the parameters into files of at most ``max_bytes`` (a larger tensor stands alone)."""
    files: list[list[Matrix]] = [[]]
    used = 0
    for matrix in matrices:
        if files[-1] and used + matrix.num_bytes > max_bytes:
            files.append([])
            used = 0
        files[-1].append(matrix)
        used += matrix.num_bytes
    return files


def copy_side_files(source: Path, target: Path, dtype: torch.dtype | None) -> None:
    """Copy configuration and tokenizer; write the type into ``config.json``, if one is given."""
    for path in sorted(source.iterdir()):
        if path.is_file() and path.name not in _SKIPPED_NAMES:
            if path.suffix not in _SKIPPED_SUFFIXES:
                shutil.copyfile(path, target / path.name)
    if dtype is None:
        return
    config = json.loads((target / "config.json").read_bytes())
    key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
    config[key] = _DTYPE_NAMES[dtype]
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def export_model(
    engine: ZeroEngine,
    *,
    source: Path,
    directory: Path,
    world: World,
    dtype: torch.dtype,
    recipe: Mapping[str, Any],
    payload: Mapping[str, Any],
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Write ``directory`` as a folder that plain ``transformers`` loads.

    Parameters are gathered one by one onto the rank that writes their file; no rank ever holds
    more than ``max_file_bytes`` of them. An older export there is replaced when the new one is
    complete.

    Args:
        engine: The model.
        source: Source model folder: configuration and tokenizer are taken from it.
        directory: Target folder.
        world: This process among all.
        dtype: Working type of the run.
        recipe: Resolved recipe to record.
        payload: Recorded in the manifest.
        max_file_bytes: Largest weight file.

    Collective: every rank must call it.

    Raises:
        CheckpointError: A write failed on some rank; nothing half-written stays.
    """
    publish_folder(
        world,
        directory,
        kind=KIND,
        write=lambda folder: _write_weights(engine, folder, directory, world, max_file_bytes),
        finish=lambda folder: copy_side_files(source, folder, dtype),
        payload=payload,
        recipe=recipe,
    )


def publish_folder(
    world: World,
    directory: Path,
    *,
    kind: str,
    write: Callable[[Path], dict[str, str]],
    finish: Callable[[Path], None],
    payload: Mapping[str, Any],
    recipe: Mapping[str, Any],
) -> None:
    """Let all ranks write a folder under a temporary name and publish it as an artefact.

    Args:
        world: This process among all.
        directory: Target folder; an artefact of the same kind there is replaced.
        kind: Kind of the artefact.
        write: Writes files into a folder on any rank and returns all hashes. Collective.
        finish: Writes the rest, on rank 0 alone.
        payload: Recorded in the manifest.
        recipe: Resolved recipe to record.

    Collective: every rank must call it.

    Raises:
        CheckpointError: A write failed on some rank; nothing half-written stays.
    """
    name = f".{directory.name}.tmp-{secrets.token_hex(4)}" if world.is_main else ""
    temporary = directory.with_name(world.broadcast(name))
    self_hash = ""

    def start() -> None:
        if world.is_main:
            if directory.exists():
                read_manifest(directory, kind)
            temporary.mkdir(parents=True)

    try:
        agreed_step(world, directory, start)
        hashes = write(temporary)

        def end() -> None:
            nonlocal self_hash
            if world.is_main:
                finish(temporary)
                manifest = publish(
                    temporary,
                    directory,
                    kind=kind,
                    payload=payload,
                    inputs={},
                    recipe=recipe,
                    known_hashes=hashes,
                )
                self_hash = manifest["self_hash"]

        agreed_step(world, directory, end)
        self_hash = world.broadcast(self_hash)
        agreed_step(world, directory, lambda: wait_until_visible(directory, self_hash))
    except ForgetScaleError:
        if world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def agreed_step(world: World, directory: Path, work: Callable[[], None]) -> None:
    """Do a part of an export; raise on every rank if it fails on one. Collective."""
    error: ForgetScaleError | None = None
    try:
        work()
    except DataError as found:
        error = found
    except (OSError, safetensors.SafetensorError) as found:
        error = CheckpointError(
            f"rank {world.rank} cannot write the export {directory}: {found}; free space or mend"
            " the file system, then run forgetscale export."
        )
    world.agree(error)


def _write_weights(
    engine: ZeroEngine, temporary: Path, directory: Path, world: World, max_bytes: int
) -> dict[str, str]:
    files = plan_files(engine.matrices(), max_bytes)
    index: dict[str, str] = {}
    hashes: dict[str, str] = {}
    total = 0
    for number, matrices in enumerate(files):
        world.stop_if_asked("during the export")
        name = (
            SINGLE_FILE
            if len(files) == 1
            else f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        )
        writer = number % world.size
        tensors: dict[str, Tensor] = {}
        for matrix in matrices:
            whole = engine.gather_working(matrix, writer)
            index[matrix.name] = name
            total += matrix.num_bytes
            if whole is not None:
                tensors[matrix.name] = whole.cpu().contiguous()

        def write(tensors: dict[str, Tensor] = tensors, path: Path = temporary / name) -> None:
            if tensors:
                safetensors.torch.save_file(tensors, path, {"format": "pt"})
                fsync_path(path)
                hashes[path.name] = hash_file(path)

        agreed_step(world, directory, write)

    def write_index() -> None:
        if len(files) > 1 and world.is_main:
            content = {"metadata": {"total_size": total}, "weight_map": index}
            (temporary / INDEX_FILE).write_text(json.dumps(content, indent=1), encoding="utf-8")

    agreed_step(world, directory, write_index)
    return {name: digest for part in world.gather_objects(hashes) for name, digest in part.items()}

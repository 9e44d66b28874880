"""Match the tensors of a tuned model with those of its source; decide what an edit may touch."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from torch import Tensor

from forgetscale.errors import ConfigError, DataError
from forgetscale.masks.region import Region
from forgetscale.models.raw import StoredTensor

NewRows = Literal["error", "keep"]
MAX_WIDTH = 1 << 22
_PREFIXES = ("module.", "_orig_mod.")
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
_HEADS = ("lm_head.weight", "embed_out.weight", "output.weight")
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")


class Weights(Protocol):
    """Weights readable by range: a model folder, or the ranks' files of a checkpoint."""

    directory: Path
    tensors: dict[str, StoredTensor]

    def read(self, name: str, start: int, length: int) -> Tensor:
        """Return a range of a float tensor; overwritten by the next read."""
        ...

    def read_bytes(self, name: str, start: int, length: int) -> Tensor:
        """Return a range of bytes of a tensor; overwritten by the next read."""
        ...

    def close(self) -> None:
        """Close the files."""
        ...


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of the tuned model and its partner."""

    name: str
    """Name in the tuned model."""
    source_name: str
    """Name in the source model; empty where the tensor is passed through untouched."""
    key: str
    """Name without wrappers' prefixes: the canonical order and random draws go by it."""
    stored: StoredTensor
    common: int
    """Elements that both models have: fewer than all where rows were added."""
    edited: bool
    """False: outside the region, or no float tensor; its bytes are copied."""
    twins: tuple[str, ...] = ()
    """Tied tensors stored a second time: written as copies of this one."""

    @property
    def width(self) -> int:
        """Elements of a row, the unit in which a tensor may be cut into pieces."""
        shape = self.stored.shape
        width = shape[-1] if len(shape) > 1 else math.prod(shape)
        return width if 0 < width <= MAX_WIDTH else 1

    @property
    def layer(self) -> str:
        """Group by decoder layer."""
        found = _LAYER.search(self.key)
        return f"layer {int(found[1])}" if found else "outside layers"

    @property
    def module(self) -> str:
        """Group by kind of module, such as ``q_proj``."""
        parts = self.key.split(".")
        return parts[-2] if len(parts) > 1 else parts[0]

    def group(self, scope: str) -> str:
        """Return the group within which this tensor's elements are ranked."""
        if scope == "global":
            return "all"
        return {"tensor": self.key, "layer": self.layer, "module": self.module}[scope]


def canonical(name: str) -> str:
    """Return a tensor name without the prefixes that wrappers put in front."""
    while name.startswith(_PREFIXES):
        name = name.split(".", 1)[1]
    return name


def _by_key(weights: Weights) -> dict[str, str]:
    return {canonical(name): name for name in weights.tensors}


def _is_tied(directory: Path) -> bool:
    path = directory / "config.json"
    if not path.is_file():
        return False
    content = json.loads(path.read_bytes())
    inner = content.get("text_config") or {}
    return bool(content.get("tie_word_embeddings", inner.get("tie_word_embeddings", False)))


def _ends(keys: Mapping[str, str]) -> tuple[str | None, str | None]:
    """Return the keys of the embedding and of the head, where there are."""
    embedding = next((key for key in keys if key.endswith(_EMBEDDINGS)), None)
    head = next((key for key in keys if key.endswith(_HEADS)), None)
    return embedding, head


def _missing(key: str, where: Path, names: Sequence[str], other: Path) -> DataError:
    near = difflib.get_close_matches(key, names, n=1)
    hint = f"; nearest there: {near[0]!r}" if near else ""
    return DataError(
        f"{where} holds no tensor {key!r}, which {other} has{hint}; both must be the same"
        " architecture, saved as whole models."
    )


def match(
    source: Weights, tuned: Weights, region: Region, *, new_rows: NewRows = "error"
) -> list[Entry]:
    """Pair the tensors of two models in canonical order (sorted by name).

    Args:
        source: Model before tuning.
        tuned: Model after tuning; its tensors are the result's.
        region: What may be edited.
        new_rows: ``keep`` compares the rows that both have where a vocabulary was resized, and
            keeps further rows as tuned; ``error`` refuses.

    Raises:
        DataError: Names, shapes or types do not fit.
        ConfigError: The region is empty.
    """
    before, after = _by_key(source), _by_key(tuned)
    embedding, head = _ends(after)
    tied_twin: tuple[str, str] | None = None
    if _is_tied(tuned.directory) and embedding and head:
        tied_twin = (embedding, head)
    for key in before:
        tied = key == _ends(before)[1] and _is_tied(source.directory) and _is_tied(tuned.directory)
        if key not in after and not tied:
            raise _missing(key, tuned.directory, list(after), source.directory)
    entries = []
    for key in sorted(after):
        if tied_twin and key == tied_twin[1]:
            continue
        stored = tuned.tensors[after[key]]
        partner = before.get(key)
        if partner is None and key == head and _is_tied(source.directory):
            partner = before.get(_ends(before)[0] or "")
        if partner is None:
            raise _missing(key, source.directory, list(before), tuned.directory)
        edited = region.holds(key) and stored.numel > 0
        if edited and stored.dtype is None and stored.code.startswith("F"):
            raise DataError(
                f"{tuned.directory}: {key} is stored as {stored.code}; dequantise the model first."
            )
        edited = edited and stored.dtype is not None
        common = stored.numel
        if edited:
            common = _common(source.tensors[partner], stored, tuned.directory, new_rows)
        twins = (after[tied_twin[1]],) if tied_twin and key == tied_twin[0] else ()
        entries.append(
            Entry(after[key], partner if edited else "", key, stored, common, edited, twins)
        )
    if not any(entry.edited for entry in entries):
        raise ConfigError(
            f"--include {region.include!r} --exclude {region.exclude!r} leaves no float tensor of"
            f" {tuned.directory} to edit (it has names such as {sorted(after)[0]!r})."
        )
    return entries


def _common(before: StoredTensor, after: StoredTensor, where: Path, new_rows: NewRows) -> int:
    if before.dtype is None:
        raise DataError(
            f"{where}: {after.name} is {after.code}, but {before.code} in the source model;"
            " both must hold plain floats."
        )
    if before.shape == after.shape:
        return after.numel
    resized = len(after.shape) == len(before.shape) > 0 and before.shape[1:] == after.shape[1:]
    if not resized:
        raise DataError(
            f"{where}: {after.name} has shape {list(after.shape)}, but {list(before.shape)} in the"
            " source model; both must be the same architecture."
        )
    if new_rows == "error":
        raise DataError(
            f"{where}: {after.name} has {after.shape[0]} rows, the source model {before.shape[0]};"
            " if the vocabulary was resized, --new-rows keep edits the rows both have and keeps"
            " the others as tuned."
        )
    return min(before.numel, after.numel)


def require_alike(first: Weights, other: Weights) -> None:
    """Check that two tuned models have the same tensors.

    Raises:
        DataError: They differ in a name, shape or type.
    """
    mine, theirs = _by_key(first), _by_key(other)
    for key in sorted(set(mine) | set(theirs)):
        if key not in theirs:
            raise _missing(key, other.directory, list(theirs), first.directory)
        if key not in mine:
            raise _missing(key, first.directory, list(mine), other.directory)
        one, two = first.tensors[mine[key]], other.tensors[theirs[key]]
        if one.shape != two.shape or (one.dtype is None) != (two.dtype is None):
            raise DataError(
                f"{key} is {one.code}{list(one.shape)} in {first.directory}, but"
                f" {two.code}{list(two.shape)} in {other.directory}; models to be merged must be"
                " alike."
            )

"""The "fisher basis" artefact: what source data say a model relies on, read in slices.

A folder with one safetensors file per rank that wrote it. Tensors that are as long as a weight
(``diagonal/NAME [S]``, ``vector/NAME [S, m]``) lie in parts with the place they have in the
flattened weight, so they are read at any number of ranks; the others (``left/NAME [O, m]``,
``right/NAME [I, m]``, ``values/KIND/NAME [m]``, ``trace/KIND/NAME []``) are whole, each in one of
the files.

Everything stored is in one unit, that of the Fisher matrix of a whole row: the gradient of the
negative log-likelihood is summed over a row's tokens (see ``CONVENTION``). ``scale`` in the
manifest is the mean retained eigenvalue over the model by kind (for a diagonal the mean entry);
readers divide by it, so that strengths mean the same for any loss scale and model.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from forgetscale.artifact import read_manifest, verify_artifact
from forgetscale.errors import ConfigError, DataError

BASIS_KIND = "fisher_basis"
HEADER_KEY = "forgetscale"
SLICED = ("diagonal", "vector")
KINDS = ("diagonal", "vector", "left", "right")
CONVENTION = "gradient of the log-likelihood summed over the tokens of a row, squared, mean of rows"


@dataclass(slots=True)
class MeasuredBasis:
    """One rank's share of a basis, before it is written.

    Args:
        slices: ``KIND/NAME`` -> place of the first row in the flattened weight, and values.
        whole: Name -> tensor that every rank has alike.
        payload: For the manifest, the same on every rank.
    """

    slices: dict[str, tuple[int, Tensor]] = field(default_factory=dict)
    whole: dict[str, Tensor] = field(default_factory=dict)
    payload: dict[str, Any] = field(default_factory=dict)


def basis_file(rank: int, size: int) -> str:
    """Return the name of a rank's file."""
    return f"basis-{rank:05d}-of-{size:05d}.safetensors"


def save_share(directory: Path, measured: MeasuredBasis, rank: int, size: int) -> Path:
    """Write one rank's file: its slices, and its share of what all ranks hold alike.

    Args:
        directory: Folder of the artefact while it is written.
        measured: What this rank holds.
        rank: This rank.
        size: Number of ranks.
    """
    tensors = {key: value.contiguous().cpu() for key, (_, value) in measured.slices.items()}
    tensors = {key: value for key, value in tensors.items() if value.numel()}
    places = {key: measured.slices[key][0] for key in tensors}
    mine = sorted(measured.whole)[rank::size]
    tensors |= {key: measured.whole[key].contiguous().cpu() for key in mine}
    path = directory / basis_file(rank, size)
    header = {HEADER_KEY: json.dumps({"places": places}, sort_keys=True)}
    safetensors.torch.save_file(tensors, path, header)
    return path


class FisherBasis:
    """A basis on disk; values are divided by the model-wide scale.

    Args:
        directory: The artefact.
        verify: Hash every file now; False where that was done already.

    Raises:
        DataError: There is none, or it was damaged.
    """

    def __init__(self, directory: Path, *, verify: bool = True) -> None:
        self.directory = Path(directory)
        read = verify_artifact if verify else read_manifest
        manifest = read(self.directory, BASIS_KIND)
        self.payload: Mapping[str, Any] = manifest["payload"]
        self.self_hash: str = manifest["self_hash"]
        self._whole: dict[str, Any] = {}
        self._parts: dict[str, list[tuple[int, int, Any]]] = {}
        for name in sorted(manifest["files"]):
            handle: Any = safetensors.safe_open(self.directory / name, "pt")
            places = json.loads(handle.metadata()[HEADER_KEY])["places"]
            for key in handle.keys():  # noqa: SIM118 - safe_open is no mapping
                if key in places:
                    length = handle.get_slice(key).get_shape()[0]
                    self._parts.setdefault(key, []).append((places[key], length, handle))
                else:
                    self._whole[key] = handle

    def names(self, kind: str) -> list[str]:
        """Return the weights that have a part of a kind, sorted."""
        keys = self._parts if kind in SLICED else self._whole
        return sorted(key.removeprefix(f"{kind}/") for key in keys if key.startswith(f"{kind}/"))

    def _require(self, kind: str, name: str) -> str:
        key = f"{kind}/{name}"
        if key not in (self._parts if kind in SLICED else self._whole):
            near = difflib.get_close_matches(name, self.names(kind), n=1)
            hint = f"; nearest: {near[0]}" if near else ""
            raise ConfigError(
                f"Fisher basis {self.directory} holds no {kind} part of {name} (it has"
                f" {len(self.names(kind))}{hint}); make it again with forgetscale calibrate --kind"
                " fisher."
            )
        return key

    def scale(self, kind: str) -> float:
        """Return the model-wide mean retained eigenvalue, or 1 where all are zero."""
        return float(self.payload["scale"][kind]) or 1.0

    def values(self, kind: str, name: str) -> Tensor:
        """Return the eigenvalues of a kind, ``[m]``, normalised."""
        return self._tensor(f"values/{kind}", name) / self.scale(kind)

    def trace(self, kind: str, name: str) -> float:
        """Return the trace of the whole Fisher matrix as this kind measures it, normalised."""
        return float(self._tensor(f"trace/{kind}", name)) / self.scale(kind)

    def grid(self, name: str) -> Tensor:
        """Return the Kronecker eigenvalues of both sides together, ``[m, k]``, normalised as left.

        Each side holds its own eigenvalues times the trace of the other one.
        """
        values = torch.outer(self.values("left", name), self.values("right", name))
        trace = self.trace("right", name)
        return values / trace if trace > 0 else values

    def side(self, kind: str, name: str) -> Tensor:
        """Return the directions of one side, ``[O or I, m]``."""
        return self._tensor(kind, name)

    def _tensor(self, kind: str, name: str) -> Tensor:
        key = self._require(kind, name)
        found: Tensor = self._whole[key].get_tensor(key)
        return found

    def read(self, kind: str, name: str, start: int, length: int) -> Tensor:
        """Return a slice of a diagonal, normalised, or of directions of the flattened weight.

        Args:
            kind: ``diagonal`` or ``vector``.
            name: The weight.
            start: First element of the flattened weight.
            length: Elements.
        """
        key = self._require(kind, name)
        shape = self._parts[key][0][2].get_slice(key).get_shape()
        found = torch.empty(length, *shape[1:])
        done = 0
        for first, count, handle in self._parts[key]:
            low, high = max(start, first), min(start + length, first + count)
            if low < high:
                view = handle.get_slice(key)
                found[low - start : high - start] = view[low - first : high - first]
                done += high - low
        if done != length:
            raise DataError(
                f"{self.directory}: {key} has {done} of {length} elements from {start} on; the"
                " basis belongs to another model."
            )
        return found / self.scale(kind) if kind == "diagonal" else found

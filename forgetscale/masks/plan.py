"""The freeze plan: which elements must never change, by name, without a mask of full size.

Columns and rows are index lists. Single elements are bits: one bit per element of the tensors they
are planned in, 0.8 GB for the matrices of a 7B model. ``load_plan`` maps those from the file, so
that ranks of one machine share them and each touches the pages of its own slices alone.
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

from forgetscale.artifact import ArtifactWriter, canonical_json, hash_bytes, verify_artifact
from forgetscale.errors import ConfigError, DataError
from forgetscale.masks.bits import ElementMask, count_bits, num_bytes
from forgetscale.masks.flat import SliceMask

PLAN_FILE = "plan.safetensors"
SCORES_FILE = "scores.safetensors"
PLAN_KIND = "freeze_plan"
HEADER_KEY = "forgetscale"
Mask = SliceMask | ElementMask
"""What a plan says about one slice."""


@dataclass(frozen=True, slots=True)
class FreezePlan:
    """Input columns, output rows, single elements or whole parameters that must not change.

    Names are those of the source model's safetensors. A vector's elements are its columns.

    Args:
        columns: Parameter name -> sorted int64 indices of frozen input columns.
        rows: Parameter name -> sorted int64 indices of frozen output rows.
        whole: Names of parameters of which nothing may change.
        provenance: How the plan was made: method, score, fraction, model and data hashes.
        elements: Parameter name -> uint8 bits of its flattened elements, 1 where frozen (see
            ``forgetscale.masks.bits``). A parameter has elements or indices, not both.
        scores: Parameter name -> fp32 score per column that decided, for reports; no part of the
            plan's hash. Empty where nothing was scored by columns.
    """

    columns: Mapping[str, Tensor] = field(default_factory=dict)
    rows: Mapping[str, Tensor] = field(default_factory=dict)
    whole: frozenset[str] = frozenset()
    provenance: Mapping[str, Any] = field(default_factory=dict)
    elements: Mapping[str, Tensor] = field(default_factory=dict)
    scores: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Sorted names of all parameters the plan speaks of."""
        return sorted({*self.columns, *self.rows, *self.elements, *self.whole})

    def content_hash(self) -> str:
        """Return the SHA-256 of what is frozen (not of the provenance)."""
        parts = {
            "columns": {name: index.tolist() for name, index in self.columns.items()},
            "rows": {name: index.tolist() for name, index in self.rows.items()},
            "whole": sorted(self.whole),
        }
        if self.elements:
            parts["elements"] = {
                name: hash_bytes(bits.contiguous().numpy().data)
                for name, bits in self.elements.items()
            }
        return hash_bytes(canonical_json(parts))

    def check_model(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Check that every name exists and every index is in range, sorted and single.

        Raises:
            ConfigError: The plan does not fit; the message names the tensor.
        """
        for name in self.names:
            if name not in shapes:
                near = difflib.get_close_matches(name, list(shapes), n=1)
                hint = f"; nearest: {near[0]}" if near else ""
                raise ConfigError(
                    f"freeze plan: the model has no parameter {name!r} ({len(shapes)} names{hint});"
                    " make the plan again for this model."
                )
        for label, indices, axis in (("column", self.columns, -1), ("row", self.rows, 0)):
            for name, index in indices.items():
                shape = shapes[name]
                size = shape[axis] if label == "column" or len(shape) > 1 else 1
                if index.numel() == 0:
                    continue
                if int(index[0]) < 0 or int(index[-1]) >= size:
                    raise ConfigError(
                        f"freeze plan: {name} has {size} {label}s but the plan names {label}"
                        f" {int(index[-1])}; make the plan again for this model."
                    )
                if index.numel() > 1 and not bool((index[1:] > index[:-1]).all()):
                    raise ConfigError(
                        f"freeze plan: {label} indices of {name} are not sorted or repeat;"
                        " make the plan again."
                    )
        for name, bits in self.elements.items():
            self._check_elements(name, shapes[name], bits)

    def _check_elements(self, name: str, shape: tuple[int, ...], bits: Tensor) -> None:
        numel = torch.Size(shape).numel()
        if bits.dtype != torch.uint8 or tuple(bits.shape) != (num_bytes(numel),):
            raise ConfigError(
                f"freeze plan: {name} has {numel} elements, {num_bytes(numel)} bytes of bits, but"
                f" the plan holds {list(bits.shape)} {bits.dtype}; make the plan again for this"
                " model."
            )
        if numel % 8 and int(bits[-1]) >> numel % 8:
            raise ConfigError(
                f"freeze plan: {name} has {numel} elements but the plan names an element after the"
                " last; make the plan again for this model."
            )
        if name in self.columns or name in self.rows or name in self.whole:
            raise ConfigError(
                f"freeze plan: {name} is planned by elements and by columns, rows or as a whole;"
                " give one of them."
            )

    def slice_mask(self, name: str, shape: tuple[int, ...], start: int, length: int) -> Mask | None:
        """Return the mask of a rank's slice of a parameter, or None where nothing is frozen.

        Args:
            name: Parameter name.
            shape: Shape of the whole parameter.
            start: First element of the slice in the flattened parameter.
            length: Elements in the slice, padding excluded.
        """
        if name in self.elements:
            return ElementMask.build(start, length, self.elements[name])
        columns, rows = self.columns.get(name), self.rows.get(name)
        if name in self.whole:
            columns, rows = torch.arange(shape[-1]), None
        if columns is None and rows is None:
            return None
        return SliceMask.build(start, length, shape[-1], columns, rows)

    def num_frozen(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Return how many elements of the model are frozen."""
        total = 0
        for name in self.names:
            if name in self.elements:
                total += count_bits(self.elements[name])
                continue
            shape = shapes[name]
            width = shape[-1]
            height = 1 if len(shape) == 1 else shape[0]
            if name in self.whole:
                total += width * height
                continue
            columns = self.columns[name].numel() if name in self.columns else 0
            rows = self.rows[name].numel() if name in self.rows else 0
            total += columns * height + rows * width - columns * rows
        return total


def save_plan(directory: Path, plan: FreezePlan, recipe: Mapping[str, Any] | None = None) -> None:
    """Write a plan artefact: ``plan.safetensors`` and ``manifest.json``, published at once.

    Scores of columns, where there are any, go to ``scores.safetensors`` beside them.

    Args:
        directory: Plan folder; an older plan there is replaced.
        plan: The plan.
        recipe: Resolved recipe to record.
    """
    tensors = {f"columns/{name}": index.to(torch.int32) for name, index in plan.columns.items()}
    tensors |= {f"rows/{name}": index.to(torch.int32) for name, index in plan.rows.items()}
    tensors |= {f"elements/{name}": bits.contiguous() for name, bits in plan.elements.items()}
    header = {"whole": sorted(plan.whole), "provenance": dict(plan.provenance)}
    with ArtifactWriter(directory, PLAN_KIND, recipe=recipe, replace=True) as writer:
        safetensors.torch.save_file(
            tensors, writer.path / PLAN_FILE, {HEADER_KEY: json.dumps(header, sort_keys=True)}
        )
        if plan.scores:
            scores = {name: value.cpu().contiguous() for name, value in plan.scores.items()}
            safetensors.torch.save_file(scores, writer.path / SCORES_FILE)
        writer.payload = {"content_hash": plan.content_hash(), "provenance": dict(plan.provenance)}


def load_plan(path: Path) -> FreezePlan:
    """Read a plan folder and verify its hash.

    Bits of elements stay in the file, which is mapped; indices are read.

    Raises:
        DataError: No plan is there, or it was damaged.
    """
    directory = path.parent if path.name == PLAN_FILE else path
    manifest = verify_artifact(directory, PLAN_KIND)
    columns: dict[str, Tensor] = {}
    rows: dict[str, Tensor] = {}
    elements: dict[str, Tensor] = {}
    with safetensors.safe_open(directory / PLAN_FILE, "pt") as file:
        header = json.loads((file.metadata() or {})[HEADER_KEY])
        for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
            axis, _, name = key.partition("/")
            if axis == "elements":
                elements[name] = file.get_tensor(key)
            else:
                index = file.get_tensor(key).to(torch.int64)
                {"columns": columns, "rows": rows}[axis][name] = index
    # The manifest, verified above, lists the file where scores were written.
    scored = (directory / SCORES_FILE).is_file()
    scores = safetensors.torch.load_file(directory / SCORES_FILE) if scored else {}
    whole, provenance = frozenset(header["whole"]), header["provenance"]
    plan = FreezePlan(columns, rows, whole, provenance, elements, scores)
    if plan.content_hash() != manifest["payload"]["content_hash"]:
        raise DataError(
            f"{directory}: the plan's content differs from its manifest; make it again."
        )
    return plan

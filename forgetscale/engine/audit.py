"""Freeze audit: proof that protected elements are still the source model's bits."""

from __future__ import annotations

from pathlib import Path

import torch
import xxhash
from torch import Tensor

from forgetscale.errors import AuditError
from forgetscale.masks import FreezePlan
from forgetscale.models import SafetensorsFolder
from forgetscale.zero3 import World, ZeroEngine


def _digest(values: Tensor) -> str:
    return xxhash.xxh3_128_hexdigest(values.contiguous().cpu().view(torch.uint8).numpy().data)


class FreezeAudit:
    """Hashes of this rank's frozen elements, taken from the source and compared later.

    Make it while the engine still holds the source weights, before a checkpoint is loaded: then a
    damaged or foreign checkpoint is noticed as well.

    Args:
        engine: The model.
    """

    def __init__(self, engine: ZeroEngine) -> None:
        self._shards = shards = engine.shards
        self._world = engine.world
        self._matrix_of = engine.layout.matrix_of
        self._expected = {
            item.name: (
                _digest(shards.masks[item.name].frozen_elements(item.working)),
                _digest(shards.masks[item.name].frozen_elements(item.working).float()),
            )
            for item in shards.slices
            if item.name in shards.masks
        }

    def _changed(self) -> str | None:
        for item in self._shards.slices:
            if item.name not in self._expected:
                continue
            mask = self._shards.masks[item.name]
            working, master = self._expected[item.name]
            if _digest(mask.frozen_elements(item.working)) != working:
                return f"{self._matrix_of(item.name)} (working copy)"
            if _digest(mask.frozen_elements(self._shards.master(item)).float()) != master:
                return f"{self._matrix_of(item.name)} (fp32 master)"
        return None

    def check(self, step: int) -> None:
        """Compare every frozen element with the source.

        Collective: every rank must call it.

        Raises:
            AuditError: A frozen element changed on some rank; the message names it.
        """
        for rank, name in enumerate(self._world.gather_objects(self._changed())):
            if name is not None:
                raise AuditError(
                    f"freeze audit at step {step}: rank {rank} holds a changed frozen element of"
                    f" {name}; the run stops, its checkpoints before this step are unaffected."
                )


def audit_export(
    plan: FreezePlan, source: SafetensorsFolder, export: Path, world: World, dtype: torch.dtype
) -> int:
    """Compare the frozen elements of an exported folder with the source model's, bit by bit.

    Args:
        plan: Freeze plan.
        source: Source model.
        export: Exported Hugging Face folder.
        world: This process among all; ranks share the tensors.
        dtype: Working type of the run, to which source values are converted first.

    Returns:
        Number of tensors compared over all ranks. Collective: every rank must call it.

    Raises:
        AuditError: A frozen element differs.
    """
    written = SafetensorsFolder(export)
    names = plan.names
    failure = None
    for name in names[world.rank :: world.size]:
        shape = source.shape(name)
        size = torch.Size(shape).numel()
        mask = plan.slice_mask(name, shape, 0, size)
        assert mask is not None
        before = mask.frozen_elements(source.read_flat(name, 0, size, dtype))
        after = mask.frozen_elements(written.read_flat(name, 0, size))
        if before.dtype != after.dtype or _digest(before) != _digest(after):
            failure = failure or name
    for rank, name in enumerate(world.gather_objects(failure)):
        if name is not None:
            raise AuditError(
                f"freeze audit of {export}: frozen elements of {name} differ from the source model"
                f" (found by rank {rank}); the export is set aside as .bad, do not use it."
            )
    return len(names)

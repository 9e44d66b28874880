"""Write edited models: every part puts its bytes where they belong in files made beforehand."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from forgetscale.errors import CheckpointError
from forgetscale.knowledge.apply import edited_block
from forgetscale.knowledge.blocks import Block, Cutter, dropped
from forgetscale.knowledge.checkpoints import ZeroCheckpoint
from forgetscale.knowledge.counting import Arrays, Cuts, running_cuts
from forgetscale.knowledge.edits import Variant
from forgetscale.knowledge.setup import Setup, Span
from forgetscale.models.raw import RawFolder, StoredTensor, layout_header

COPY = 1 << 22
"""Bytes copied at a time where nothing is edited."""
Scales = dict[str, dict[str, float]]
"""Variant -> ``MODEL/KEY`` or ``match`` -> factor."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Files of an output: headers, sizes, and where each tensor lies."""

    headers: Mapping[str, bytes]
    sizes: Mapping[str, int]
    places: Mapping[str, StoredTensor]

    @property
    def num_bytes(self) -> int:
        """Bytes of all weight files of one output."""
        return sum(self.sizes.values())


def output_layout(setup: Setup) -> Layout:
    """Return the layout of outputs: the tuned folder's own; the source's for a checkpoint."""
    tuned = setup.tuned[0]
    if isinstance(tuned, RawFolder):
        lengths = {file: (tuned.directory / file).stat().st_size for file in tuned.files}
        return Layout(tuned.headers, lengths, tuned.tensors)
    assert isinstance(tuned, ZeroCheckpoint)
    headers: dict[str, bytes] = {}
    sizes: dict[str, int] = {}
    places: dict[str, StoredTensor] = {}
    for file in tuned.source.files:
        inside = [t for t in tuned.source.tensors.values() if t.file == file]
        wanted = [tuned.tensors[tensor.name] for tensor in inside]
        headers[file], found = layout_header(wanted, tuned.source.headers[file])
        places |= {tensor.name: tensor for tensor in found}
        sizes[file] = len(headers[file]) + sum(tensor.num_bytes for tensor in found)
    return Layout(headers, sizes, places)


def make_files(folder: Path, layout: Layout) -> None:
    """Make the files of an output at full size, so that a full disk is met before the work."""
    folder.mkdir(parents=True, exist_ok=True)
    for file, header in layout.headers.items():
        path = folder / file
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            os.posix_fallocate(descriptor, 0, layout.sizes[file])
            os.pwrite(descriptor, header, 0)
        except OSError as error:
            raise cannot_write(path, error) from error
        finally:
            os.close(descriptor)


def cannot_write(path: Path, error: OSError) -> CheckpointError:
    """Return the error for a failed write, with what to do."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    what = "free space" if full else "mend the file system"
    return CheckpointError(
        f"cannot write {path}: {error.strerror or error}; {what} and start the same command again,"
        " finished parts are kept."
    )


def measure_part(
    setup: Setup, part: int, cuts: Cuts, left: Mapping[tuple[int, str], int]
) -> Arrays:
    """Sum |d| and d^2, of all edited elements and of kept ones, by variant, model and tensor."""
    cutter = Cutter(setup, running_cuts(setup, cuts, left))
    sums: Arrays = {}
    for number, start, length in setup.blocks(setup.parts[part]):
        block = Block(setup, number, start, length)
        taken = cutter.taken(block)
        for variant in setup.plan.variants:
            for model, drop in enumerate(variant.drops):
                change = block.delta(model).double().abs_()
                mask = dropped(drop, block, model, taken)
                kept = change if mask is None else torch.where(mask, 0.0, change)
                found = [change.sum(), kept.sum(), change.square().sum(), kept.square().sum()]
                name = f"{variant.name}/{model}/{block.entry.key}"
                added = np.array([float(value) for value in found])
                sums[name] = sums[name] + added if name in sums else added
    return sums


def join_measures(setup: Setup, results: Iterable[Mapping[str, np.ndarray]]) -> Scales:
    """Return the factors that rescaling and norm-matched controls need."""
    sums: dict[str, np.ndarray] = {}
    for arrays in results:
        for name, values in arrays.items():
            sums[name] = sums[name] + values if name in sums else values
    scales: Scales = {}
    for variant in setup.plan.variants:
        own = scales.setdefault(variant.name, {})
        for model in range(len(variant.drops)):
            for entry in setup.entries:
                if entry.edited and variant.rescale in ("l1", "l2"):
                    all_l1, kept_l1, all_l2, kept_l2 = sums[f"{variant.name}/{model}/{entry.key}"]
                    whole, kept = (
                        (all_l1, kept_l1) if variant.rescale == "l1" else (all_l2, kept_l2)
                    )
                    ratio = whole / kept if kept > 0 else 1.0
                    own[f"{model}/{entry.key}"] = float(
                        ratio if variant.rescale == "l1" else np.sqrt(ratio)
                    )
        if variant.match is not None:
            original = setup.plan.variants[variant.match]
            rows = [sums[f"{original.name}/0/{e.key}"] for e in setup.entries if e.edited]
            whole, kept = sum(row[2] for row in rows), sum(row[3] for row in rows)
            own["match"] = float(np.sqrt(kept / whole)) if whole > 0 else 1.0
    return scales


class _Files:
    """Outputs opened for writing at places."""

    def __init__(self, setup: Setup, layout: Layout, models: Path) -> None:
        self._layout = layout
        self._models = models
        self._open: dict[tuple[str, str], int] = {}

    def write(self, variant: Variant, name: str, offset: int, data: torch.Tensor) -> None:
        """Write bytes of a tensor, ``offset`` bytes behind its first."""
        place = self._layout.places[name]
        key = (variant.name, place.file)
        path = self._models / variant.name / place.file
        try:
            if key not in self._open:
                self._open[key] = os.open(path, os.O_WRONLY)
            view = data.contiguous().view(torch.uint8).numpy().data
            done = 0
            while done < len(view):
                at = place.offset + offset + done
                done += os.pwrite(self._open[key], view[done:], at)
        except OSError as error:
            raise cannot_write(path, error) from error

    def flush(self) -> None:
        """Flush and close; an error here means that a write failed."""
        for (variant, file), descriptor in self._open.items():
            try:
                os.fdatasync(descriptor)
            except OSError as error:
                raise cannot_write(self._models / variant / file, error) from error
            finally:
                os.close(descriptor)
        self._open.clear()


def write_part(
    setup: Setup,
    part: int,
    cuts: Cuts,
    left: Mapping[tuple[int, str], int],
    scales: Scales,
    models: Path,
) -> Arrays:
    """Write one part of every output; return dropped elements by tensor, and hashes of inputs."""
    files = _Files(setup, output_layout(setup), models)
    cutter = Cutter(setup, running_cuts(setup, cuts, left))
    digests = [xxhash.xxh3_128() for _ in range(1 + len(setup.tuned))]
    counts: dict[str, int] = {}
    for number, start, length in setup.blocks(setup.parts[part]):
        block = Block(setup, number, start, length)
        block.require_finite()
        taken = cutter.taken(block)
        for index, values in enumerate([block.source, *map(block.tuned, range(len(setup.tuned)))]):
            digests[index].update(values.contiguous().view(torch.uint8).numpy().data)
        for variant in setup.plan.variants:
            values, count = edited_block(variant, block, taken, scales.get(variant.name, {}))
            name = f"{variant.name}/{block.entry.key}"
            counts[name] = counts.get(name, 0) + count
            for target in (block.entry.name, *block.entry.twins):
                files.write(variant, target, start * values.element_size(), values)
    for span in setup.parts[part]:
        _copy_rest(setup, span, files, digests[1])
    files.flush()
    found: Arrays = {f"count/{name}": np.array(count) for name, count in counts.items()}
    for index, digest in enumerate(digests):
        found[f"digest/{index}"] = np.frombuffer(digest.digest(), np.uint8)
    return found


def _copy_rest(setup: Setup, span: Span, files: _Files, digest: Any) -> None:
    """Copy what no edit touches: tensors outside the region, and rows only the tuned one has."""
    entry = setup.entries[span.entry]
    numel = entry.stored.numel
    if numel == 0:
        return
    size = entry.stored.num_bytes // numel
    first = max(span.start, entry.common) if entry.edited else span.start
    end = (span.start + span.length) * size
    for start in range(first * size, end, COPY):
        data = setup.tuned[0].read_bytes(entry.name, start, min(COPY, end - start))
        digest.update(data.numpy().data)
        for variant in setup.plan.variants:
            for target in (entry.name, *entry.twins):
                files.write(variant, target, start, data)


def describe_cuts(setup: Setup, cuts: Cuts) -> list[dict[str, Any]]:
    """Return thresholds in words: score, side, group, elements taken, threshold value."""
    found = []
    for (number, group), (key, equal) in cuts.items():
        cut = setup.plan.cuts[number]
        ranking = setup.plan.rankings[cut.ranking]
        size = setup.sizes(ranking.scope)[group]
        value = None
        if key is not None:
            bits = np.array([key], np.int32)
            value = key if ranking.score == "random" else float(bits.view(np.float32)[0])
        found.append(
            {
                "score": ranking.score,
                "model": ranking.model,
                "side": cut.side,
                "group": group,
                "elements": size,
                "taken": cut.count(size),
                "threshold": value,
                "taken_of_equal": equal,
            }
        )
    return found

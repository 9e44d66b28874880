"""Edit a tuned model against its source, out of core: the whole of ``forgetscale restore``."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from forgetscale.artifact import fsync_path, hash_file, publish, read_manifest
from forgetscale.checkpoint.export import copy_side_files
from forgetscale.errors import ConfigError, DataError
from forgetscale.knowledge.checkpoints import ZeroCheckpoint
from forgetscale.knowledge.counting import (
    Arrays,
    Cuts,
    Places,
    count_part,
    join_counts,
    join_refined,
    refine_part,
)
from forgetscale.knowledge.edits import Variant
from forgetscale.knowledge.setup import Request, Setup, cached_setup, forget_setup, open_setup
from forgetscale.knowledge.work import Crew, Results
from forgetscale.knowledge.writing import (
    Layout,
    Scales,
    cannot_write,
    describe_cuts,
    join_measures,
    make_files,
    measure_part,
    output_layout,
    write_part,
)
from forgetscale.models.weights import INDEX_FILE

KIND = "model_edit"
SPACE_FACTOR = 1.02
Left = dict[tuple[int, str], int]


@dataclass(frozen=True, slots=True)
class Place:
    """Where and with what a restore runs."""

    output: Path
    workers: int = 1
    rank: int = 0
    size: int = 1
    visible: bool = True


def read_ranks(
    output: Path,
    workers: int | None,
    rank: int | None,
    size: int | None,
    environment: Mapping[str, str],
) -> Place:
    """Return where to work; what is not given follows from the machine and the launcher.

    Args:
        output: Output folder.
        workers: Local processes, or None for all cores (at most 8).
        rank: This rank, or None for ``RANK``.
        size: Ranks, or None for ``WORLD_SIZE``.
        environment: Variables a launcher sets.

    Raises:
        ConfigError: A number is impossible.
    """
    if workers is None:
        has = hasattr(os, "sched_getaffinity")
        workers = min(len(os.sched_getaffinity(0)) if has else os.cpu_count() or 1, 8)
    rank = int(environment.get("RANK", "0")) if rank is None else rank
    size = int(environment.get("WORLD_SIZE", "1")) if size is None else size
    if workers < 1 or not 0 <= rank < size:
        raise ConfigError(
            f"--workers {workers} must be >= 1 and --rank {rank} below --world-size {size}."
        )
    return Place(output, workers, rank, size, visible=rank == 0)


def check_output(request: Request, output: Path) -> None:
    """Refuse an output that would meet an input.

    Raises:
        ConfigError: The output is an input, inside one or around one.
    """
    target = output.resolve()
    for name, path in (("--source", request.source), *(("--tuned", p) for p in request.tuned)):
        given = path.resolve()
        if target == given or target in given.parents or given in target.parents:
            raise ConfigError(
                f"--output {output} meets {name} {path}; inputs are never written to, name another"
                " folder."
            )


def output_folders(setup: Setup, output: Path) -> dict[str, Path]:
    """Return variant name -> folder: the output itself for one, folders in it for several."""
    variants = setup.plan.variants
    if len(variants) == 1:
        return {variants[0].name: output}
    return {variant.name: output / variant.name for variant in variants}


def describe(setup: Setup) -> str:
    """Return what would be done, with exact counts, for ``--dry-run``."""
    edited = [entry for entry in setup.entries if entry.edited]
    total = sum(entry.common for entry in edited)
    lines = [
        f"region: include {setup.region.include!r}, exclude {setup.region.exclude!r}:"
        f" {len(edited)} of {len(setup.entries)} tensors, {total} elements",
    ]
    for cut in setup.plan.cuts:
        ranking = setup.plan.rankings[cut.ranking]
        sizes = setup.sizes(ranking.scope)
        taken = sum(cut.count(size) for size in sizes.values())
        lines.append(
            f"cut: {taken} elements from the {cut.side} by {ranking.score} score, in"
            f" {len(sizes)} group{'s' if len(sizes) > 1 else ''} ({ranking.scope} scope)"
        )
    layout = output_layout(setup)
    names = [variant.name for variant in setup.plan.variants]
    lines.append(f"outputs: {len(names)} ({', '.join(names)}), {layout.num_bytes} bytes each")
    lines.append(f"parts of work: {len(setup.parts)} a pass")
    return "\n".join(lines)


def count_stage(part: int, request: Request) -> Arrays:
    """``count_part`` in any process."""
    return count_part(cached_setup(request), part)


def refine_stage(part: int, request: Request, places: Places) -> Arrays:
    """``refine_part`` in any process."""
    return refine_part(cached_setup(request), part, places)


def measure_stage(part: int, request: Request, cuts: Cuts, left: Left) -> Arrays:
    """``measure_part`` in any process."""
    return measure_part(cached_setup(request), part, cuts, left)


def write_stage(
    part: int, request: Request, cuts: Cuts, scales: Scales, models: Path, left: Left
) -> Arrays:
    """``write_part`` in any process."""
    return write_part(cached_setup(request), part, cuts, left, scales, models)


def hash_stage(part: int, files: list[Path]) -> Arrays:
    """Flush one finished file and hash it."""
    try:
        fsync_path(files[part])
    except OSError as error:
        raise cannot_write(files[part], error) from error
    return {"sha256": np.array(hash_file(files[part]))}


def _is_done(folder: Path, digest: str) -> bool:
    if not folder.exists():
        return False
    if folder.is_dir() and not any(folder.iterdir()):
        return False
    manifest = read_manifest(folder, KIND)
    if manifest["payload"]["request"] != digest:
        raise DataError(
            f"{folder} holds the result of another edit; name another --output or remove it."
        )
    return True


def restore(request: Request, place: Place, log: Callable[[str], None]) -> dict[str, Path]:
    """Write the models a request asks for.

    Every rank must call it with the same request; one alone is enough.

    Args:
        request: What to do.
        place: Output folder, processes, and this rank among independent ones.
        log: Receives one line per event.

    Returns:
        Variant name -> published folder.

    Raises:
        ConfigError: The request makes no sense.
        DataError: An input cannot be used, or the output exists.
        CheckpointError: Writing failed; finished parts are kept for the next start.
    """
    check_output(request, place.output)
    forget_setup()
    setup = open_setup(request)
    digest = request.digest()
    folders = output_folders(setup, place.output)
    if all([_is_done(folder, digest) for folder in folders.values()]):
        log(f"{place.output} is complete already")
        return folders
    if len(folders) > 1 and place.output.is_file():
        raise DataError(f"{place.output} is a file; name a folder.")
    layout = output_layout(setup)
    work = place.output.with_name(f".{place.output.name}.work-{digest[:12]}")
    _check_space(layout, setup, work)
    try:
        with Crew(work, place.rank, place.size, place.workers, place.visible) as crew:
            _run(request, setup, layout, crew, folders, digest)
            if place.rank == 0:
                for stage, seconds in crew.seconds.items():
                    log(f"{stage}: {seconds:.2f} s")
    except OSError as error:
        # Rank 0 removes the work folder when all is published; a late rank finds it gone.
        if place.rank > 0 and all([_is_done(folder, digest) for folder in folders.values()]):
            return folders
        raise cannot_write(work, error) from error
    except (ConfigError, DataError):
        # No later start can use what was done; a failed write keeps it.
        if place.rank == 0:
            shutil.rmtree(work, ignore_errors=True)
        raise
    if place.rank == 0:
        shutil.rmtree(work)
    return folders


def _check_space(layout: Layout, setup: Setup, work: Path) -> None:
    if work.exists():  # space may be taken already; making the files will tell
        return
    parent = work.parent
    while not parent.exists():
        parent = parent.parent
    needed = int(SPACE_FACTOR * layout.num_bytes * len(setup.plan.variants))
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise DataError(
            f"{parent} has {free / 1e9:.2f} GB free, {len(setup.plan.variants)} outputs need"
            f" {needed / 1e9:.2f} GB; free space or ask for fewer at once."
        )


def _run(
    request: Request,
    setup: Setup,
    layout: Layout,
    crew: Crew,
    folders: dict[str, Path],
    digest: str,
) -> None:
    models, count = crew.folder / "models", len(setup.parts)
    made = crew.folder / "made"
    cuts: Cuts = {}
    left: list[Left] = [{} for _ in range(count)]
    if setup.plan.cuts:
        places = join_counts(setup, crew.run("count", count_stage, count, (request,)))
        refined = crew.run("refine", refine_stage, count, (request, places))
        cuts, left = join_refined(setup, places, refined)
    scales: Scales = {}
    if setup.plan.measures:
        measured = crew.run("measure", measure_stage, count, (request, cuts), left)
        scales = join_measures(setup, measured)
    if crew.rank == 0 and not made.exists():
        for variant in setup.plan.variants:
            make_files(models / variant.name, layout)
        made.touch()
    crew.wait_for(made.exists)
    written = crew.run("write", write_stage, count, (request, cuts, scales, models), left)
    files = [models / v.name / file for v in setup.plan.variants for file in sorted(layout.headers)]
    hashed = crew.run("hash", hash_stage, len(files), (files,))
    if crew.rank == 0:
        hashes = {path: str(arrays["sha256"]) for path, arrays in zip(files, hashed, strict=True)}
        _publish_all(request, setup, models, folders, digest, (cuts, scales, written, hashes))
    crew.wait_for(lambda: all(_is_done(folder, digest) for folder in folders.values()))


def _publish_all(
    request: Request,
    setup: Setup,
    models: Path,
    folders: dict[str, Path],
    digest: str,
    found: tuple[Cuts, Scales, Results, dict[Path, str]],
) -> None:
    cuts, scales, written, hashes = found
    counts, inputs = _join_written(setup, written)
    for variant in setup.plan.variants:
        target = folders[variant.name]
        if _is_done(target, digest):
            continue
        folder = models / variant.name
        _copy_side_files(setup, folder)
        publish(
            folder,
            target,
            kind=KIND,
            payload=_payload(request, setup, variant, cuts, scales, counts) | {"request": digest},
            inputs=inputs,
            recipe=None,
            known_hashes={
                path.name: value for path, value in hashes.items() if path.parent == folder
            },
        )


def _join_written(setup: Setup, written: Results) -> tuple[dict[str, int], dict[str, str]]:
    counts: dict[str, int] = {}
    digests = [xxhash.xxh3_128() for _ in range(1 + len(setup.tuned))]
    for arrays in written:
        for name, value in arrays.items():
            kind, rest = name.split("/", 1)
            if kind == "count":
                counts[rest] = counts.get(rest, 0) + int(value)
            else:
                digests[int(rest)].update(value.tobytes())
    names = ["source", *(f"tuned/{model}" for model in range(len(setup.tuned)))]
    return counts, {
        name: f"xxh3-parts:{digest.hexdigest()}"
        for name, digest in zip(names, digests, strict=True)
    }


def _payload(
    request: Request,
    setup: Setup,
    variant: Variant,
    cuts: Cuts,
    scales: Scales,
    counts: dict[str, int],
) -> dict[str, Any]:
    options = {name: _plain(value) for name, value in asdict(request.options).items()}
    own = {name.split("/", 1)[1]: n for name, n in counts.items()
           if name.split("/", 1)[0] == variant.name}  # fmt: skip
    used = {number for drop in variant.drops for number in drop.cuts}
    chosen = {place: cut for place, cut in cuts.items() if place[0] in used}
    return {
        "variant": variant.name,
        **dict(variant.label),
        "options": options,
        "source": str(request.source),
        "tuned": [str(path) for path in request.tuned],
        "analysed": "working copies of a checkpoint"
        if isinstance(setup.tuned[0], ZeroCheckpoint)
        else "stored weights",
        "region": {"include": setup.region.include, "exclude": setup.region.exclude},
        "elements": sum(entry.common for entry in setup.entries if entry.edited),
        "dropped": sum(own.values()),
        "dropped_by_tensor": own,
        "order_of_equals": "tensor name, then flat index; earlier first",
        "cuts": describe_cuts(setup, chosen),
        "scales": scales.get(variant.name, {}),
        "weights": list(variant.weights),
    }


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, bool | int | float | str) else str(value)


def _copy_side_files(setup: Setup, folder: Path) -> None:
    """Copy configuration, tokenizer and index of the model whose layout the output has."""
    tuned = setup.tuned[0]
    if isinstance(tuned, ZeroCheckpoint):
        copy_side_files(tuned.source.directory, folder, tuned.dtype)
        origin = tuned.source.directory
    else:
        copy_side_files(tuned.directory, folder, None)
        origin = tuned.directory
    index = origin / INDEX_FILE
    if index.is_file():
        content = json.loads(index.read_bytes())
        if isinstance(tuned, ZeroCheckpoint):
            content["metadata"] = {"total_size": sum(t.num_bytes for t in tuned.tensors.values())}
            (folder / INDEX_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        else:
            shutil.copyfile(index, folder / INDEX_FILE)

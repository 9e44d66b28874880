"""What a pass over two models works on: opened weights, matched tensors, parts of work.

Parts follow from the list of tensors alone, never from the number of processes: sums are formed
part by part and joined in order, so results do not depend on who computed them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from forgetscale.artifact import canonical_json, hash_bytes
from forgetscale.errors import ConfigError, DataError
from forgetscale.knowledge.checkpoints import ZeroCheckpoint, is_checkpoint
from forgetscale.knowledge.edits import EditOptions, EditPlan, check_options, plan_edits
from forgetscale.knowledge.pairs import (
    Entry,
    NewRows,
    Weights,
    canonical,
    match,
    require_alike,
)
from forgetscale.masks.region import Region, default_region
from forgetscale.models.raw import RawFolder

BLOCK = 1 << 18
"""Elements computed at a time: small enough for a core's cache."""
PART = 1 << 27
"""Elements of a part of work: the unit of resumption."""


@dataclass(frozen=True, slots=True)
class Request:
    """What a command asks for; small, and the same in every process."""

    source: Path
    tuned: tuple[Path, ...]
    options: EditOptions
    include: str | None = None
    """None together with ``exclude`` is the default region."""
    exclude: str | None = None
    new_rows: NewRows = "error"
    fisher: Path | None = None
    part: int = PART
    block: int = BLOCK

    def digest(self) -> str:
        """Return a hash of everything that decides the result, and of the inputs' file times."""
        stamps = [
            [str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns]
            for folder in (self.source, *self.tuned, *([self.fisher] if self.fisher else []))
            for path in (sorted(folder.glob("*.safetensors")) if folder.is_dir() else [folder])
        ]
        return hash_bytes(canonical_json([repr(self), stamps]))


@dataclass(frozen=True, slots=True)
class Span:
    """A piece of one tensor."""

    entry: int
    start: int
    length: int


@dataclass(slots=True)
class Setup:
    """Opened inputs of a request.

    Use ``open_setup``.
    """

    request: Request
    plan: EditPlan
    source: Weights
    tuned: tuple[Weights, ...]
    fisher: RawFolder | None
    fisher_names: dict[str, str]
    region: Region
    entries: list[Entry]
    tuned_names: list[dict[str, str]]
    parts: list[list[Span]] = field(default_factory=list)

    def blocks(self, spans: Sequence[Span]) -> Iterator[tuple[int, int, int]]:
        """Cut the edited, comparable range of spans into blocks of whole rows."""
        for span in spans:
            entry = self.entries[span.entry]
            if not entry.edited:
                continue
            end = min(span.start + span.length, entry.common)
            step = max(self.request.block // entry.width, 1) * entry.width
            for start in range(span.start, end, step):
                yield span.entry, start, min(step, end - start)

    def sizes(self, scope: str) -> dict[str, int]:
        """Return elements that may be edited per group of a scope."""
        found: dict[str, int] = {}
        for entry in self.entries:
            if entry.edited:
                group = entry.group(scope)
                found[group] = found.get(group, 0) + entry.common
        return found


def cut_parts(entries: Sequence[Entry], size: int) -> list[list[Span]]:
    """Cut tensors, in order, into parts of about ``size`` elements, between rows."""
    parts: list[list[Span]] = [[]]
    room = size
    for number, entry in enumerate(entries):
        start, numel, width = 0, entry.stored.numel, entry.width
        while start < numel:
            if room < min(width, numel - start) and parts[-1]:
                parts.append([])
                room = size
            length = min(max(room // width, 1) * width, numel - start)
            parts[-1].append(Span(number, start, length))
            start += length
            room -= length
    return [part for part in parts if part]


def _open_weights(path: Path, source: RawFolder) -> Weights:
    if is_checkpoint(path):
        return ZeroCheckpoint(path, source)
    return RawFolder(path)


def open_setup(request: Request) -> Setup:
    """Open and match the inputs of a request; reads headers only.

    Raises:
        ConfigError: The options do not fit together, or the region is empty.
        DataError: A folder cannot be used; the message says which and why.
    """
    check_options(request.options, len(request.tuned), request.fisher is not None)
    source = RawFolder(request.source)
    tuned = tuple(_open_weights(path, source) for path in request.tuned)
    for other in tuned[1:]:
        require_alike(tuned[0], other)
    keys = [canonical(name) for name in tuned[0].tensors]
    region = default_region(keys)
    if request.include is not None or request.exclude is not None:
        region = Region(request.include or ".", request.exclude or "")
    elif request.options.method != "restore":
        region = Region(".")
    entries = match(source, tuned[0], region, new_rows=request.new_rows)
    fisher, fisher_names = None, {}
    if request.fisher is not None:
        fisher = RawFolder.of_file(request.fisher)
        fisher_names = _fisher_names(fisher, request.fisher, entries)
    if request.options.method == "della":
        _require_rows(entries)
    setup = Setup(
        request,
        plan_edits(request.options, len(tuned)),
        source,
        tuned,
        fisher,
        fisher_names,
        region,
        entries,
        [{canonical(name): name for name in weights.tensors} for weights in tuned],
        cut_parts(entries, request.part),
    )
    _require_elements(setup)
    return setup


def _require_elements(setup: Setup) -> None:
    for cut in setup.plan.cuts:
        scope = setup.plan.rankings[cut.ranking].scope
        sizes = setup.sizes(scope).values()
        if cut.share > 0 and not any(cut.count(size) for size in sizes):
            raise ConfigError(
                f"--fraction {float(cut.share):g} of {sum(sizes)} elements ({scope} scope) is less"
                " than one element; raise it, or give 0 for none."
            )


def _fisher_names(fisher: RawFolder, path: Path, entries: Sequence[Entry]) -> dict[str, str]:
    names = {canonical(name): name for name in fisher.tensors}
    for entry in entries:
        if entry.edited:
            found = fisher.tensors.get(names.get(entry.key, ""))
            if found is None or found.shape != entry.stored.shape or found.dtype is None:
                what = "is missing" if found is None else f"has shape {list(found.shape)}"
                raise DataError(
                    f"--fisher {path}: {entry.key} {what}, expected floats of shape"
                    f" {list(entry.stored.shape)}; use --include for the tensors it covers."
                )
    return names


def _require_rows(entries: Sequence[Entry]) -> None:
    for entry in entries:
        if entry.edited and entry.width == 1 and entry.stored.numel > 1:
            raise ConfigError(
                f"--method della ranks within rows, but a row of {entry.name} is too long"
                f" ({list(entry.stored.shape)}); leave it out with --exclude."
            )


_OPENED = threading.local()


def cached_setup(request: Request) -> Setup:
    """Return ``open_setup(request)``, once per process and thread: reads go into its buffers."""
    found: tuple[Request, Setup] | None = getattr(_OPENED, "last", None)
    if found is None or found[0] != request:
        forget_setup()
        found = _OPENED.last = (request, open_setup(request))
    return found[1]


def forget_setup() -> None:
    """Close what ``cached_setup`` keeps open: the files may have changed since."""
    found: tuple[Request, Setup] | None = getattr(_OPENED, "last", None)
    if found is not None:
        for weights in (found[1].source, *found[1].tuned):
            weights.close()
    _OPENED.last = None

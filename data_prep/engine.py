"""Units of work done by many processes that share a folder, the results always in input order.

A process that finds an unread file claims it, cuts it into units and puts them into the spool
folder for others, or does them itself when enough are waiting. Taking a unit is renaming its file,
which only one process can do; so work goes to whoever is free, and there is no process that hands
it out. Files and units are named after the input alone, results are kept from start to start.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data_prep.readers import Line, ReadOptions, SourceReader, is_plain_text
from data_prep.team import Team, wait_for
from data_prep.tokenise import (
    DocumentOptions,
    DocumentReader,
    TokenizeOptions,
    UnitSurveyor,
    UnitTokenizer,
)
from data_prep.tokenise_sft import SftOptions, UnitSupervisor
from data_prep.units import Unit, UnitResult, load_result, save_result
from forgetscale.artifact import canonical_json, hash_bytes, write_json

_LONG_LINE_UNITS = 4
_SPOOL_PER_WORKER = 4
_LEAST_PAUSE, _MOST_PAUSE = 0.004, 0.25


class Processor(Protocol):
    """What turns units into results."""

    reader: DocumentReader

    @property
    def splits(self) -> bool:
        """Whether long documents are divided among workers."""

    def __call__(self, unit: Unit) -> UnitResult:
        """Return the result of a unit."""


@dataclass(frozen=True, slots=True)
class Source:
    """An input file: its place in the input and the name its results are kept under."""

    index: int
    path: Path
    key: str

    @classmethod
    def of(cls, index: int, path: Path) -> Source:
        """Return the source at ``path``, identified by path, size and time of change."""
        status = path.stat()
        identity = [str(path.resolve()), status.st_size, status.st_mtime_ns]
        return cls(index, path, hash_bytes(canonical_json(identity))[:16])


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkOrder:
    """All that a worker must know.

    Attributes:
        folder: Where results are kept.
        run: Folder of this start inside it.
        sources: Input files in order.
        read: How files are read.
        documents: How lines become documents.
        tokenize: How documents become tokens.
        sft: How conversations become supervised tokens instead; None: they do not.
        survey: Whether documents are chosen in a first pass.
        near: Whether that pass makes signatures.
        unit_bytes: Text of a unit.
        fence: Hash of the settings; results made under others are not seen.
    """

    folder: Path
    run: Path
    sources: tuple[Source, ...]
    read: ReadOptions
    documents: DocumentOptions
    tokenize: TokenizeOptions
    sft: SftOptions | None
    survey: bool
    near: bool
    unit_bytes: int
    fence: str


class Stage:
    """One pass over the input: which results there are and which units are left.

    Args:
        name: ``survey`` or ``tokens``.
        order: The work.
        team: The processes.
        processor: Does units; None in a process that only merges.
        chosen: Lines to take of each source, sorted; None: all.
    """

    def __init__(
        self,
        name: str,
        order: WorkOrder,
        team: Team,
        processor: Processor | None,
        chosen: list[np.ndarray] | None = None,
    ) -> None:
        self.order = order
        self._team = team
        self._processor = processor
        self._chosen = chosen
        self._run = order.run / name
        self._stop = self._run / "stop"
        self._folder = order.folder / name / order.fence
        self._high_water = 0 if team.num_workers == 1 else _SPOOL_PER_WORKER * team.num_workers
        self._scanning: Iterator[None] | None = None
        self._next_source = 0
        for part in ("spool", "taken", "claims", "scanned"):
            (self._run / part).mkdir(parents=True, exist_ok=True)

    def folder(self, source: Source) -> Path:
        """Return where results of ``source`` are kept."""
        if self._chosen is None:
            return self._folder / source.key
        digest = hash_bytes(np.ascontiguousarray(self._chosen[source.index], "<i8").tobytes())
        return self._folder / f"{source.key}-{digest[:16]}"

    def stop_after(self, source: Source, unit: int) -> None:
        """Say that no unit after this one is needed."""
        write_json(self._stop, [source.index, unit])

    def step(self) -> bool:
        """Do a unit, or cut the next one; return whether there was something to do."""
        if self._processor is None:
            return False
        if self._scanning is not None:
            if next(self._scanning, self) is self:
                self._scanning = None
            return True
        if (taken := self._take()) is not None:
            self._do(*taken)
            return True
        if (source := self._claim()) is not None:
            self._scanning = self._scan(source)
            return True
        return False

    def is_over(self) -> bool:
        """Return whether no unit can appear any more."""
        num_scanned = len(os.listdir(self._run / "scanned"))
        return num_scanned == len(self.order.sources) and not os.listdir(self._run / "spool")

    def description(self, source: Source) -> dict[str, Any] | None:
        """Return what was found in a file, or None until it was read to its end."""
        if not (self._run / "scanned" / str(source.index)).exists():
            return None
        found: dict[str, Any] = json.loads((self.folder(source) / "source.json").read_bytes())
        return found

    def _claim(self) -> Source | None:
        while self._next_source < len(self.order.sources):
            source = self.order.sources[self._next_source]
            self._next_source += 1
            try:
                flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
                os.close(os.open(self._run / "claims" / str(source.index), flags))
            except FileExistsError:
                continue
            return source
        return None

    def _scan(self, source: Source) -> Iterator[None]:
        """Cut a file into units and see that each gets done; one step a unit."""
        folder = self.folder(source)
        folder.mkdir(parents=True, exist_ok=True)
        if not self._is_complete(folder):
            with SourceReader(source.path, self.order.read) as reader:
                cutter = _Cutter(reader, self.order.unit_bytes, self._lines_of(source))
                splitter = self._processor if self._processor and self._processor.splits else None
                for unit in cutter.units(splitter):
                    if not self._is_needless(source, unit.number):
                        self._hand_over(source, unit)
                    yield
                description = {
                    "num_units": cutter.num_units,
                    "num_lines": cutter.num_lines,
                    "num_chosen": cutter.num_chosen,
                    "size": source.path.stat().st_size,
                    "sha256": reader.sha256,
                }
            write_json(folder / "source.json", description)
        (self._run / "scanned" / str(source.index)).touch()

    def _lines_of(self, source: Source) -> np.ndarray | None:
        return None if self._chosen is None else self._chosen[source.index]

    def _is_complete(self, folder: Path) -> bool:
        """Return whether an earlier start left all results of a file, intact."""
        description = folder / "source.json"
        if not description.is_file():
            return False
        count = json.loads(description.read_bytes())["num_units"]
        return all(load_result(folder / f"{unit:07d}") is not None for unit in range(count))

    def _is_needless(self, source: Source, unit: int) -> bool:
        if not self._stop.exists():
            return False
        last: list[int] = json.loads(self._stop.read_bytes())
        return [source.index, unit] > last

    def _hand_over(self, source: Source, unit: Unit) -> None:
        if load_result(self.folder(source) / f"{unit.number:07d}") is not None:
            return
        spool = self._run / "spool"
        if self._high_water and len(os.listdir(spool)) < self._high_water:
            name = f"{source.index:06d}-{unit.number:07d}"
            temporary = self._run / f"{name}.{self._team.rank}"
            temporary.write_bytes(unit.to_bytes())
            temporary.rename(spool / name)
        else:
            self._do(source, unit)

    def _take(self) -> tuple[Source, Unit] | None:
        """Take a waiting unit, unless another process is faster."""
        for name in sorted(os.listdir(self._run / "spool")):
            taken = self._run / "taken" / f"{name}.{self._team.rank}"
            try:
                os.rename(self._run / "spool" / name, taken)
            except FileNotFoundError:
                if not taken.exists():  # a network file system may answer late
                    continue
            source = self.order.sources[int(name.partition("-")[0])]
            unit = Unit.from_bytes(taken.read_bytes())
            taken.unlink()
            if not self._is_needless(source, unit.number):
                return source, unit
        return None

    def _do(self, source: Source, unit: Unit) -> None:
        assert self._processor is not None
        path = self.folder(source) / f"{unit.number:07d}"
        save_result(path, self._processor(unit), f"{self._team.token}-{self._team.rank}")


class _Cutter:
    """Cut the lines of a file into units; counts what it saw."""

    def __init__(self, reader: SourceReader, unit_bytes: int, chosen: np.ndarray | None) -> None:
        self.num_lines = 0
        self.num_chosen = 0
        self.num_units = 0
        self._reader = reader
        self._unit_bytes = unit_bytes
        self._chosen = None if chosen is None else iter(chosen.tolist())
        self._plain = is_plain_text(reader.path)
        self._reported = 0

    def units(self, splitter: Processor | None) -> Iterator[Unit]:
        """Yield units of about ``unit_bytes``; a long document becomes several, if possible."""
        lines: list[Line] = []
        size = 0
        wanted = None if self._chosen is None else next(self._chosen, None)
        for line in self._reader.lines():
            self.num_lines += 1
            if self._chosen is not None:
                if line.number != wanted:
                    continue
                wanted = next(self._chosen, None)
            self.num_chosen += 1
            is_long = splitter is not None and len(line.data) > _LONG_LINE_UNITS * self._unit_bytes
            if lines and (size >= self._unit_bytes or is_long):
                yield self._unit(lines)
                lines, size = [], 0
            if is_long and splitter is not None:
                parts = splitter.reader.split(line, self.num_units, plain_text=self._plain)
                self.num_units += len(parts)
                yield from parts
            else:
                lines.append(line)
                size += len(line.data)
        if lines:
            yield self._unit(lines)

    def _unit(self, lines: list[Line]) -> Unit:
        stored = self._reader.num_bytes - self._reported
        self._reported += stored
        self.num_units += 1
        return Unit(self.num_units - 1, lines, self._plain, stored)


class Merger(Protocol):
    """Takes results in the order of the input."""

    def add(self, source: Source, unit: int, result: UnitResult) -> bool:
        """Take a result; return False if no further one is wanted."""

    def finish_source(self, source: Source, description: dict[str, Any]) -> None:
        """Take note that all results of a file were taken, or none is wanted any more."""


def run_merging(stage: Stage, team: Team, merger: Merger) -> None:
    """Do units where this process works, and give all results to ``merger``, in order."""
    wanted = True
    idle = _Idle(team)
    for source in stage.order.sources:
        unit = 0
        folder = stage.folder(source)
        while True:
            result = load_result(folder / f"{unit:07d}") if wanted else None
            if result is not None:
                wanted = merger.add(source, unit, result)
                if not wanted:
                    stage.stop_after(source, unit)
                unit += 1
                idle.reset()
                continue
            description = stage.description(source)
            if description is not None and (not wanted or unit == description["num_units"]):
                merger.finish_source(source, description)
                break
            if stage.step():
                idle.reset()
            else:
                idle.wait()


class _Idle:
    """Waits a little longer each time there is nothing to do, and looks after the team."""

    def __init__(self, team: Team) -> None:
        self._team = team
        self._seconds = _LEAST_PAUSE

    def wait(self) -> None:
        self._team.check()
        time.sleep(self._seconds)
        self._seconds = min(self._seconds * 1.5, _MOST_PAUSE)

    def reset(self) -> None:
        self._seconds = _LEAST_PAUSE


def run_working(stage: Stage, team: Team) -> None:
    """Do units until none can appear any more."""
    idle = _Idle(team)
    while not stage.is_over():
        if stage.step():
            idle.reset()
        else:
            idle.wait()


def survey_stage(order: WorkOrder, team: Team) -> Stage:
    """Return the first pass, over all lines."""
    processor = UnitSurveyor(order.documents, near=order.near) if team.works else None
    return Stage("survey", order, team, processor)


def token_stage(order: WorkOrder, team: Team, chosen: list[np.ndarray] | None) -> Stage:
    """Return the pass that makes tokens, over all lines or the chosen ones."""
    processor: Processor | None = None
    if team.works:
        checked = replace(order.documents, filters=None) if order.survey else order.documents
        if order.sft is None:
            processor = UnitTokenizer(checked, order.tokenize)
        else:
            processor = UnitSupervisor(checked, order.sft)
    return Stage("tokens", order, team, processor, chosen)


def publish_choice(order: WorkOrder, chosen: list[np.ndarray]) -> None:
    """Tell the workers which lines were chosen."""
    np.savez(order.run / "chosen.tmp.npz", *chosen)
    (order.run / "chosen.tmp.npz").rename(order.run / "chosen.npz")


def work(order: WorkOrder, team: Team) -> None:
    """Do units of all passes; what every process runs except the one that merges."""
    chosen = None
    if order.survey:
        run_working(survey_stage(order, team), team)
        path = order.run / "chosen.npz"
        wait_for(path.exists, team)
        with np.load(path) as stored:
            chosen = [stored[f"arr_{index}"] for index in range(len(order.sources))]
    run_working(token_stage(order, team, chosen), team)

"""The fault matrix: what is broken, when, and what the next start must make of it.

Every case trains the same tiny recipe (6 steps, a checkpoint every 2), breaks something once, and
starts the same command again. The run must end with the bits of the uninterrupted one, from the
newest checkpoint that is good.
"""

from __future__ import annotations

import random
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tests.distributed.harness import Job, Outcome, RankServer
from tests.distributed.jobs import INSTANT, flip_bit
from tests.distributed.runs import SSU, Run, Runs, load_weights, read_lines

EXACT = ("step", "loss", "grad_norm", "lr", "target_tokens", "skipped_steps")
FILES = ("states", "rng", "method")
KILLED, FAILED = -int(signal.SIGKILL), 1
PLACES = (
    "in a step, before the optimizer",
    "in a step, after the optimizer",
    "between step and save",
)


@dataclass(frozen=True)
class Case:
    """One thing that goes wrong.

    Attributes:
        group: ``kill``, ``instant``, ``write fault`` or ``damage``.
        point: Where it happens: a label, a place in a step, seconds, or the damage.
        file: Kind of file it is about, empty for none.
        action: What happens there.
        number: At which passing of the point.
        left: Steps of which one must be the newest checkpoint that the next start uses; 0 for
            none, empty for any.
    """

    group: str
    point: str
    file: str = ""
    action: str = "kill"
    number: int = 2
    left: tuple[int, ...] = ()
    short: bool = False
    """Whether the usual test run has it."""

    @property
    def name(self) -> str:
        """For tests and folders."""
        words = (self.group, self.action, self.point, self.file, str(self.number))
        return ", ".join(word for word in words if word)


def _kill(
    point: str, file: str = "", *, published: bool = False, short: bool = False
) -> list[Case]:
    """At the first and at the second save."""
    first, second = ((2,), (4,)) if published else ((0,), (2,))
    return [
        Case("kill", point, file, number=1, left=first),
        Case("kill", point, file, number=2, left=second, short=short),
    ]


def cases() -> list[Case]:
    """Return all cases with a fixed point; instants are drawn by ``instants``."""
    found = [
        Case("kill", PLACES[0], number=1, left=(0,)),
        Case("kill", PLACES[0], number=4, left=(0, 2), short=True),
        Case("kill", PLACES[1], number=5, left=(2, 4), short=True),
        Case("kill", PLACES[2], number=2, left=(2,)),
        Case("kill", "json: written", "plan", number=1, left=(0,), short=True),
        Case("kill", "save: asked", number=1, left=(0,)),
        Case("kill", "save: asked", number=2, left=(0, 2)),
        *_kill("save: begun"),
        *_kill("save: folder made"),
        *_kill("save: states copied", short=True),
        *[
            case
            for file in FILES
            for point in ("file: opened", "file: begun", "file: written")
            for case in _kill(point, file, short=(file, point) == ("states", "file: begun"))
        ],
        *[
            case
            for file in FILES
            for point in ("file: flushed", "file: verified")
            for case in _kill(point, file)
        ],
        *_kill("save: rank done"),
        *_kill("save: all ranks done"),
        *_kill("publish: files flushed"),
        *_kill("json: written", "manifest"),
        *_kill("publish: manifest written", short=True),
        *_kill("publish: renamed", published=True, short=True),
        *_kill("json: written", "latest", published=True, short=True),
        *_kill("save: published", published=True),
    ]
    prunes = ("prune: old one renamed", "prune: old one removed")
    found += [Case("kill", point, number=1, left=(6,)) for point in prunes]
    found.append(
        Case(
            "kill",
            prunes[0],
            action="kill in the middle of the removal",
            number=1,
            left=(6,),
            short=True,
        )
    )
    for file in FILES:
        found += [
            Case("write fault", "file: begun", file, "ENOSPC", left=(2,), short=file == "rng"),
            Case("write fault", "file: written", file, "EIO", left=(2,), short=file == "states"),
            Case(
                "write fault", "file: written", file, "bit flip", left=(2,), short=file == "method"
            ),
            Case("write fault", "file: written", file, "lost tail", left=(2,)),
        ]
    found += [
        Case("write fault", "save: begun", "states", "short write", left=(2,), short=True),
        Case("write fault", "json: written", "manifest", "ENOSPC", left=(2,)),
        Case("write fault", "publish: manifest written", "", "EIO", left=(2,)),
        Case("write fault", "json: written", "latest", "ENOSPC", left=(4,)),
    ]
    for file in (*FILES, "manifest"):
        for action in ("bit flip", "cut short", "removed"):
            short = (file, action) in (("rng", "bit flip"), ("states", "cut short"))
            found.append(Case("damage", "newest checkpoint", file, action, left=(2,), short=short))
    found.append(Case("damage", "newest checkpoint", "latest", "bit flip", left=(4,)))
    found.append(Case("damage", "newest checkpoint", "foreign", "added", left=(2,)))
    return found


def loop_seconds(ranks: RankServer, runs: Runs, width: int = 2) -> float:
    """Return how long all steps and saves take on this machine, ``width`` runs side by side.

    The start of the ranks and the export do not count: they would be most of the time, and a kill
    there breaks nothing. What is returned is the fastest of six runs.
    """
    runs.get(SSU, 1)  # starts the rank server, whose imports must not count either
    found = []
    for repeat in range(-(-6 // width)):
        recipes = [runs.recipe(f"timed-{repeat}-{i}", SSU) for i in range(width)]
        jobs = [Job("crash:time_loop", {"recipe": recipe}) for recipe in recipes]
        outcomes = ranks.run_all(jobs)
        assert all(outcome.codes == [0] for outcome in outcomes), outcomes[0].logs[0][-2000:]
        found += [outcome.value for outcome in outcomes]
        for recipe in recipes:
            shutil.rmtree(recipe["run"]["output_dir"])
    return min(found)


def instants(number: int, seconds: float, seed: int = 0) -> list[Case]:
    """Return kills at random times of the steps and saves of a run (``loop_seconds``)."""
    generator = random.Random(seed)
    times = [generator.uniform(0.0, 1.0) * seconds for _ in range(number)]
    return [Case("instant", f"{found:.3f} s", number=i) for i, found in enumerate(times)]


def damage(case: Case, checkpoint: Path) -> None:
    """Change a published checkpoint."""
    files = {
        "states": next(checkpoint.glob("states-*")),
        "rng": checkpoint / "rng" / "rank-00000.json",
        "method": checkpoint / "method.pt",
        "manifest": checkpoint / "manifest.json",
        "latest": checkpoint.parent / "latest",
        "foreign": checkpoint / "states-99999-of-00001.safetensors",
    }
    path = files[case.file]
    if case.action == "bit flip":
        flip_bit(path)
    elif case.action == "cut short":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif case.action == "removed":
        path.unlink()
    else:
        path.write_bytes(b"not ours")


def exact_lines(folder: Path) -> list[dict[str, Any]]:
    """Return what must be equal in ``metrics.jsonl``."""
    return [{k: line[k] for k in EXACT} for line in read_lines(folder / "metrics.jsonl")]


def difference(folder: Path, expected: Run) -> str | None:
    """Return how a run differs from the uninterrupted one, None if not by one bit."""
    if exact_lines(folder) != exact_lines(expected.folder):
        return "metrics.jsonl differs"
    found = load_weights(folder / "export")
    if set(found) != set(expected.export):
        return "the export has other tensors"
    for name, weight in expected.export.items():
        if not torch.equal(found[name], weight):
            return f"the export differs in {name}"
    leftovers = [p.name for p in (folder / "checkpoints").iterdir() if p.name.startswith(".")]
    return f"{leftovers[0]} was left" if leftovers else None


def resumed_step(outcome: Outcome) -> int:
    """Return the step a start went on from, 0 for none."""
    lines = [line for line in outcome.logs[0].splitlines() if "resumed from" in line]
    return int(lines[0].rpartition("step-")[2]) if lines else 0


@dataclass(frozen=True)
class Row:
    """What became of a case."""

    case: Case
    exit_code: int
    resumed_step: int
    end_code: int
    difference: str | None
    missed: int = 0
    """Times that a drawn instant came too late and half of it was taken."""

    @property
    def problem(self) -> str | None:
        """Return what is wrong, None if all is as it must be."""
        expected = {"kill": (KILLED,), "instant": (KILLED,), "write fault": (FAILED,)}
        codes = expected.get(self.case.group, (KILLED,))
        if self.exit_code not in codes:
            return f"exit code {self.exit_code}, expected {codes[0]}"
        if self.end_code:
            return f"the next start ended with {self.end_code}"
        if self.case.left and self.resumed_step not in self.case.left:
            return f"went on from step {self.resumed_step}, expected {self.case.left}"
        return self.difference

    def as_json(self) -> dict[str, Any]:
        """Return the row for the result file."""
        found = {k: v for k, v in asdict(self.case).items() if k not in ("left", "short")}
        found |= {"exit_code": self.exit_code, "resumed_step": self.resumed_step}
        found["missed"] = self.missed
        return found | {"bit_equal": self.difference is None, "problem": self.problem}


def missed(rows: Sequence[Row]) -> int:
    """Return how many drawn instants came after the last save, so that an earlier one was taken."""
    return sum(row.missed > 0 for row in rows)


def _seconds(case: Case) -> float:
    return float(case.point.split()[0])


def _crash(case: Case, recipe: dict[str, Any]) -> Job:
    if case.group == "instant":
        return Job("crash:train_into_loop", {"recipe": recipe, "seconds": _seconds(case)})
    if case.group == "damage":
        place = {"point": PLACES[0], "number": 6}
        return Job("crash:train_until", {"recipe": recipe, **place})
    if case.point in PLACES:
        place = {"point": case.point, "number": case.number}
        return Job("crash:train_until", {"recipe": recipe, **place})
    if case.action == "short write":
        args = {"recipe": recipe, "number": case.number, "rank": None, "how": "limit"}
        return Job("crash:train_with_full_disk", args)
    args = {"recipe": recipe, "label": case.point, "what": case.file, "action": case.action}
    return Job("crash:train_to_point", args | {"number": case.number})


def _instant(crash: Outcome) -> str:
    """Return where the kill at an instant found the run."""
    said = [line for line in crash.logs[0].splitlines() if line.startswith(INSTANT)]
    return f"kill after step {said[0].removeprefix(INSTANT)}" if said else "kill"


def run_cases(
    ranks: RankServer,
    runs: Runs,
    wanted: Sequence[Case],
    say: Callable[[Row], None] = lambda row: None,
    width: int = 2,
) -> list[Row]:
    """Run cases, ``width`` side by side, and compare each with the uninterrupted run."""
    whole = runs.get(SSU, 1)
    rows = []
    for first in range(0, len(wanted), width):
        group = list(wanted[first : first + width])
        recipes = [runs.recipe(f"fault-{time.monotonic_ns()}-{i}", SSU) for i in range(len(group))]
        folders = [Path(recipe["run"]["output_dir"]) for recipe in recipes]
        crashes = ranks.run_all([_crash(c, r) for c, r in zip(group, recipes, strict=True)])
        late = [0] * len(group)
        for i, recipe in enumerate(recipes):
            while group[i].group == "instant" and crashes[i].codes == [0]:
                shutil.rmtree(folders[i])  # the last save was done before; this run was faster
                late[i] += 1
                group[i] = replace(group[i], point=f"{_seconds(group[i]) / 2:.3f} s")
                crashes[i] = ranks.run_all([_crash(group[i], recipe)])[0]
            if group[i].group == "instant":
                group[i] = replace(group[i], action=_instant(crashes[i]))
        for case, folder in zip(group, folders, strict=True):
            if case.group == "damage":
                damage(case, sorted((folder / "checkpoints").glob("step-*"))[-1])
        ends = ranks.run_all([Job("training:command", {"recipe": recipe}) for recipe in recipes])
        done = zip(group, crashes, ends, folders, late, strict=True)
        for case, crash, end, folder, times in done:
            differs = None if any(end.codes) else difference(folder, whole)
            row = Row(case, crash.codes[0], resumed_step(end), end.codes[0], differs, times)
            rows.append(row)
            say(row)
            shutil.rmtree(folder)
    return rows

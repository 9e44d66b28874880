"""How long a recipe takes to get safe when it is asked to stop: a rehearsal in every phase."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from forgetscale.errors import ForgetScaleError, StoppedEarly

PHASES = (
    ("evaluation of the source model", r"^evaluate \d+/\d+ "),
    ("calibration", r"^calibrate \d+/\d+ "),
    ("training", r"^train \d+/\d+ "),
    ("export", r"^train (\d+)/\1 "),
    ("evaluation of the export", r"^exported "),
)
"""Name of a phase, and the line of the log that shows the run is in it."""


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """What happened when a run was asked to stop in one phase.

    Attributes:
        phase: Name of the phase.
        seconds: From the signal to the end of the last process; None if the phase never came.
        exit_code: Exit code of the command.
    """

    phase: str
    seconds: float | None
    exit_code: int

    def line(self, limit_seconds: float) -> str:
        """Return the rehearsal's line of the table."""
        if self.seconds is None:
            return f"{self.phase:32} did not come before the run ended with {self.exit_code}"
        safe = "safe" if self.is_safe(limit_seconds) else "NOT SAFE"
        return f"{self.phase:32} {self.seconds:8.1f} s   exit code {self.exit_code:3}   {safe}"

    def is_safe(self, limit_seconds: float) -> bool:
        """Return whether it was in time; a run that was done before the signal counts too."""
        if self.seconds is None:
            return self.exit_code == 0
        return self.seconds <= limit_seconds and self.exit_code in (0, StoppedEarly.exit_code)


def stop_in_phase(command: Sequence[str], phase: str, shown_by: str) -> Rehearsal:
    """Start a command, send SIGUSR1 to all its processes in a phase, wait for its end.

    Args:
        command: Program and arguments.
        phase: Name of the phase.
        shown_by: Regular expression of the line the command prints when it is there.
    """
    # Launchers must outlive the signal, as they do in launch/slurm_job.sh.
    ignoring = ["bash", "-c", 'trap "" USR1; exec "$@"', "bash", *command]
    asked: list[float] = []
    with subprocess.Popen(
        ignoring,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if not asked and re.search(shown_by, line):
                asked.append(time.monotonic())
                os.killpg(process.pid, signal.SIGUSR1)
    ended = time.monotonic()
    seconds = ended - asked[0] if asked else None
    return Rehearsal(phase, seconds, process.returncode)


def rehearse(
    command: Sequence[str],
    limit_seconds: float,
    say: Callable[[str], None],
    phases: Sequence[tuple[str, str]] = PHASES,
) -> list[Rehearsal]:
    """Stop a run once in every phase, each time going on where it stopped; then let it end.

    Args:
        command: Starts or resumes the run.
        limit_seconds: Notice that a scheduler gives, such as 120 of ``--signal=USR1@120``.
        say: Takes a line of the result at a time.
        phases: Name and pattern of each.

    Raises:
        ForgetScaleError: A phase was not safe in time, or the run did not end well afterwards.
    """
    found = []
    for phase, shown_by in phases:
        rehearsal = stop_in_phase(command, phase, shown_by)
        found.append(rehearsal)
        say(rehearsal.line(limit_seconds))
    end = subprocess.run(command, capture_output=True, text=True, errors="replace")
    say(f"{'resumed after all of them':32} exit code {end.returncode}")
    bad = [each.phase for each in found if not each.is_safe(limit_seconds)]
    if bad:
        raise ForgetScaleError(
            f"check --preemption: not safe within {limit_seconds:.0f} s: {', '.join(bad)}; give"
            " notice earlier (sbatch --signal=USR1@SECONDS) or make the phase shorter."
        )
    if end.returncode:
        tail = "\n".join(end.stdout.splitlines()[-3:] + end.stderr.splitlines()[-3:])
        raise ForgetScaleError(
            f"check --preemption: the run did not go on to its end (exit code {end.returncode}):"
            f"\n{tail}"
        )
    return found

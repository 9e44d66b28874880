"""The command line as a process runs it."""

from __future__ import annotations

from forgetscale.cli import main


def run(arguments: list[str]) -> None:
    """Run a command and end with its exit code."""
    raise SystemExit(main(arguments))

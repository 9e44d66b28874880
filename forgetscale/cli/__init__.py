"""Command line: one file per command."""

from forgetscale.cli.main import main

__all__ = ["main"]

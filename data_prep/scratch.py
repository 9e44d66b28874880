"""The folder beside the output that keeps finished units from start to start."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from forgetscale.errors import DataError

_RESULT_FOLDERS = ("survey", "tokens")


def scratch_folder(output: Path) -> Path:
    """Return where finished units of ``output`` are kept: ``.NAME.work`` beside it."""
    return output.with_name(f".{output.name}.work")


def holds_results(folder: Path) -> bool:
    """Return whether ``folder`` keeps at least one finished unit."""
    return any(
        path.is_file() for name in _RESULT_FOLDERS for path in (folder / name).rglob("[0-9]" * 7)
    )


class Scratch:
    """Makes the folder of this start and clears it away afterwards; a context manager.

    Args:
        outputs: Folders to be made; the first one names the scratch folder.
        token: Name of this start.
        shared: Whether other ranks may still look into it after a failure.

    Raises:
        DataError: An output exists, or its place cannot be written.
    """

    def __init__(self, outputs: Sequence[Path], token: str, *, shared: bool = False) -> None:
        self._outputs = outputs
        self._shared = shared
        self.folder = scratch_folder(outputs[0])
        self.run = self.folder / f"run-{token}"

    def __enter__(self) -> Scratch:
        """Make the folder."""
        for output in self._outputs:
            if output.exists():
                raise DataError(
                    f"{output} exists already; name another output folder or remove it."
                )
            try:
                output.parent.mkdir(parents=True, exist_ok=True)
                probe = output.with_name(f".{output.name}.probe")
                probe.mkdir()
                probe.rmdir()
            except OSError as error:
                raise DataError(
                    f"output folder {output} cannot be made ({error.strerror}); name another"
                    " --output or change the rights of the folder above it."
                ) from error
        for stale in self.folder.glob("run-*"):
            shutil.rmtree(stale, ignore_errors=True)
        self.run.mkdir(parents=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Remove everything after success; after a failure keep finished units, if any."""
        if kind is not None and self._shared:
            return  # the next start removes what is of no use
        shutil.rmtree(self.run, ignore_errors=True)
        if kind is None or not holds_results(self.folder):
            shutil.rmtree(self.folder, ignore_errors=True)
        if kind is None:
            for output in self._outputs:
                for stale in output.parent.glob(f".{output.name}.tmp-*"):
                    shutil.rmtree(stale, ignore_errors=True)

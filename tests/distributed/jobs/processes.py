"""Jobs that start the process group themselves, as a command does."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from tests.distributed.jobs.training import command


def without_compiler(recipe: dict, extensions: str) -> dict[str, Any]:
    """Train alone, without a launcher and without a compiler to be found."""
    os.environ["PATH"] = str(Path(extensions) / "no-programs")
    os.environ |= {"CXX": "/bin/false", "CC": "/bin/false", "TORCH_EXTENSIONS_DIR": extensions}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)
    compiler = shutil.which("g++") or shutil.which("gcc") or shutil.which("c++")
    command(recipe)
    built = [str(path) for path in Path(extensions).rglob("*") if path.is_file()]
    return {"compiler": compiler, "built": built}

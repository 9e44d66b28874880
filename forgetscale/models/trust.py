"""Model folders that bring Python code: none of it runs unless the folder is named for it.

``trust_remote_code`` of transformers is off everywhere. A recipe turns it on for its own model
(``model.trust_remote_code``), a command for a folder; what is then run is logged file by file.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoTokenizer

from forgetscale.artifact import hash_file
from forgetscale.errors import ConfigError, DataError

_FILES = ("config.json", "tokenizer_config.json", "generation_config.json")
_trusted: set[Path] = set()


def code_references(directory: Path) -> list[str]:
    """Return what the configuration files of a model folder would import, sorted."""
    found: set[str] = set()
    for name in _FILES:
        path = Path(directory) / name
        if not path.is_file():
            continue
        try:
            value = json.loads(path.read_bytes())
        except ValueError as error:
            raise DataError(f"{path} is not valid JSON ({error}).") from error
        entries = value.get("auto_map", {}) if isinstance(value, dict) else {}
        for entry in entries.values() if isinstance(entries, dict) else ():
            found |= {str(item) for item in (entry if isinstance(entry, list) else [entry]) if item}
        if isinstance(value, dict) and value.get("custom_generate"):
            found.add(str(value["custom_generate"]))
    return sorted(found)


def trust_code(directory: Path, log: Callable[[str], None]) -> None:
    """Let the Python files of a model folder run in this process, and log each with its hash.

    Args:
        directory: Model folder that the user named for it.
        log: Receives one line per file.

    Raises:
        ConfigError: The folder refers to code that is not in it; it would come from a network.
    """
    directory = Path(directory)
    for reference in code_references(directory):
        if "--" in reference or not (directory / f"{reference.split('.')[0]}.py").is_file():
            raise ConfigError(
                f"{directory} wants to run {reference!r}, which is not in the folder; code from a"
                " network is never run; put the file there or remove the entry from auto_map."
            )
    for path in sorted(directory.glob("*.py")):
        log(f"trust_remote_code: {path} may run (SHA-256 {hash_file(path)})")
    _trusted.add(directory.resolve())


def is_trusted(directory: Path | str | None) -> bool:
    """Return whether the folder was named for running its code."""
    return bool(directory) and Path(str(directory)).resolve() in _trusted


def refuse_code(directory: Path) -> None:
    """Refuse a folder whose model or tokenizer is not part of transformers itself.

    A folder may name code beside an architecture that transformers knows; that is ignored.

    Raises:
        ConfigError: It needs code, and was not named for it.
        DataError: A configuration file is no JSON.
    """
    if is_trusted(directory):
        return
    path = Path(directory) / "config.json"
    references = code_references(directory)
    if not references or not path.is_file():
        return
    if json.loads(path.read_bytes()).get("model_type") not in CONFIG_MAPPING:
        raise ConfigError(
            f"{directory} needs Python code of its own ({references[0]}), which would run with your"
            " rights; read it, then set model.trust_remote_code: true (in a recipe) or give"
            " --trust-remote-code (to evaluate)."
        )


def load_tokenizer(directory: Path) -> Any:
    """Load the tokenizer of a local folder; code in the folder runs only if it is trusted.

    Raises:
        ConfigError: The folder needs code and was not named for it.
    """
    refuse_code(directory)
    return AutoTokenizer.from_pretrained(
        directory, local_files_only=True, trust_remote_code=is_trusted(directory)
    )

"""Read a task of lm-evaluation-harness from a folder, without running anything in it.

A task is ``TASKS/lm_eval/NAME.yaml``. Its data are local files, named in
``dataset_kwargs.data_files`` relative to the YAML file. Three things in such files can run code,
and all are closed: ``!function`` imports Python (refused unless allowed by the task's name),
templates are rendered by an ordinary Jinja environment (replaced by a sandboxed one in
``task.py``), and a data set or metric that is not known goes to the hub and may bring a script
(refused).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from forgetscale.artifact import canonical_json, hash_bytes, hash_file
from forgetscale.config import UniqueKeyLoader
from forgetscale.errors import ConfigError, DataError

HARNESS_PREFIX = "lm_eval/"
BUILDERS = ("json", "parquet", "csv", "text", "arrow")
OUTPUT_TYPES = ("loglikelihood", "loglikelihood_rolling", "multiple_choice", "generate_until")
CODE_TAG = "!function"


@dataclass(frozen=True, slots=True)
class Code:
    """``!function module.name`` in a task file, not imported."""

    name: str
    file: Path
    """The YAML file it stands in."""

    @property
    def source(self) -> Path | None:
        """The Python file beside the YAML file, or None for an installed module."""
        module = self.name.rpartition(".")[0].replace(".", "/")
        path = self.file.parent / f"{module}.py"
        return path if path.is_file() else None


@dataclass(frozen=True, slots=True)
class HarnessFile:
    """A checked task file.

    Attributes:
        name: Task name with its prefix, ``lm_eval/NAME``.
        path: The YAML file.
        config: Its content, includes merged, data files as absolute paths, code not imported.
        code: Functions it would import, in the order they stand.
        content_hash: SHA-256 over YAML, data and Python files.
    """

    name: str
    path: Path
    config: Mapping[str, Any]
    code: tuple[Code, ...]
    content_hash: str

    @property
    def output_type(self) -> str:
        """Kind of request, one of ``OUTPUT_TYPES``."""
        return str(self.config.get("output_type", "generate_until"))

    @property
    def generates(self) -> bool:
        """Whether the task needs generated text."""
        return self.output_type == "generate_until"


def is_harness(name: str) -> bool:
    """Return whether ``name`` is a task of lm-evaluation-harness."""
    return name.startswith(HARNESS_PREFIX)


def harness_names(task_dir: Path) -> list[str]:
    """Return the names of the harness tasks under ``task_dir``, sorted.

    Files whose name starts with ``_`` are parts that others include.
    """
    found = (Path(task_dir) / HARNESS_PREFIX).glob("*.yaml")
    return sorted(HARNESS_PREFIX + path.stem for path in found if not path.name.startswith("_"))


class _TaskLoader(UniqueKeyLoader):
    """Safe loader that refuses repeated keys and notes functions instead of importing them."""

    file: Path

    def function(self, node: yaml.Node) -> Code:
        """Note a function."""
        assert isinstance(node, yaml.ScalarNode)
        return Code(str(self.construct_scalar(node)), self.file)


_TaskLoader.add_constructor(CODE_TAG, _TaskLoader.function)


def _read_yaml(path: Path) -> dict[str, Any]:
    loader = type("Loader", (_TaskLoader,), {"file": path})
    try:
        value = yaml.load(path.read_bytes(), loader)
    except yaml.YAMLError as error:
        raise DataError(f"{path} is not safe YAML: {' '.join(str(error).split())}.") from error
    except ConfigError as error:
        raise DataError(f"{path}: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} holds {type(value).__name__}, expected a task (a mapping).")
    return value


def _below(root: Path, path: Path, where: str) -> Path:
    """Return ``path`` with links resolved, refusing what lies outside the folder of tasks."""
    resolved = path.resolve()
    if not resolved.is_relative_to(root):
        raise DataError(
            f"{where} names {resolved}, which lies outside the folder of tasks {root}; copy it"
            " there, or name the folder above both as the task folder."
        )
    if not resolved.is_file():
        raise DataError(f"{where} names {resolved}, which does not exist; check the path.")
    return resolved


def _merged(path: Path, root: Path, seen: list[Path]) -> dict[str, Any]:
    """Return a file with what it includes; keys of the file itself win."""
    if path in seen:
        raise DataError(f"{path} includes itself; remove the circle.")
    seen.append(path)
    config = _read_yaml(path)
    includes = config.pop("include", [])
    merged: dict[str, Any] = {}
    for item in includes if isinstance(includes, list) else [includes]:
        merged |= _merged(_below(root, path.parent / str(item), f"{path}: include"), root, seen)
    return merged | config


def _codes(value: Any) -> Iterator[Code]:
    if isinstance(value, Code):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _codes(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _codes(item)


def _local_data(config: Mapping[str, Any], path: Path, root: Path) -> dict[str, list[Path]]:
    """Return split -> data files, refusing everything that is not a plain local file."""
    builder = config.get("dataset_path")
    if builder not in BUILDERS:
        raise DataError(
            f"{path}: dataset_path is {builder!r}, expected one of {', '.join(BUILDERS)} with"
            " dataset_kwargs.data_files; other data sets come from a network or run code."
        )
    kwargs = config.get("dataset_kwargs") or {}
    if not isinstance(kwargs, Mapping) or set(kwargs) != {"data_files"}:
        named = sorted(kwargs) if isinstance(kwargs, Mapping) else kwargs
        raise DataError(f"{path}: dataset_kwargs names {named}, expected data_files alone.")
    files = kwargs["data_files"]
    if not isinstance(files, Mapping):
        raise DataError(f"{path}: dataset_kwargs.data_files must name a file for each split.")
    where = f"{path}: dataset_kwargs.data_files"
    return {
        str(split): [
            _below(root, path.parent / str(item), where)
            for item in (named if isinstance(named, list) else [named])
        ]
        for split, named in files.items()
    }


def read_harness_file(
    task_dir: Path, name: str, *, allow_code: Collection[str] = ()
) -> HarnessFile:
    """Read and check ``task_dir/lm_eval/NAME.yaml``; imports nothing.

    Args:
        task_dir: Folder of tasks; every file the task names must lie in it.
        name: Task name, ``lm_eval/NAME``.
        allow_code: Names of tasks that may import Python.

    Raises:
        ConfigError: The task imports code and is not allowed to.
        DataError: A file is missing, malformed, outside the folder, or not local.
    """
    root = Path(task_dir).resolve()
    path = _below(root, root / f"{name}.yaml", f"task {name!r}")
    seen: list[Path] = []
    config = _merged(path, root, seen)
    if "group" in config or "task_list" in config or isinstance(config.get("task"), list):
        raise DataError(f"{path} is a group of tasks; put each task into a file of its own.")
    output_type = config.get("output_type", "generate_until")
    if output_type not in OUTPUT_TYPES:
        raise DataError(
            f"{path}: output_type is {output_type!r}, expected one of {', '.join(OUTPUT_TYPES)}."
        )
    code = tuple(_codes(config))
    _require_allowed(name, path, code, allow_code, "class" in config or "use_prompt" in config)
    data = _local_data(config, path, root)
    config |= {
        "task": path.stem,
        "dataset_kwargs": {
            "data_files": {split: [str(file) for file in files] for split, files in data.items()}
        },
    }
    sources = {item.source for item in code if item.source is not None}
    for source in sources:
        _below(root, source, f"{path}: {CODE_TAG}")
    files = [*seen, *(file for files in data.values() for file in files), *sorted(sources)]
    digests = {file.relative_to(root).as_posix(): hash_file(file) for file in files}
    return HarnessFile(name, path, config, code, hash_bytes(canonical_json(digests)))


def _require_allowed(
    name: str, path: Path, code: tuple[Code, ...], allowed: Collection[str], imports: bool
) -> None:
    if name in allowed or not (code or imports):
        return
    what = f"{CODE_TAG} {code[0].name}" if code else "class or use_prompt"
    raise ConfigError(
        f"task {name!r} imports code ({what} in {code[0].file if code else path}), which would run"
        " with your rights; read it, then name the task in evaluate.allow_code or --allow-code."
    )

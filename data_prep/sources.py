"""Finding input files: paths, folders, patterns, the layouts of MADLAD-400, named datasets."""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from pathlib import Path

from data_prep.readers import SUFFIXES
from forgetscale.errors import ConfigError, DataError

_FORMATS = ".jsonl, .jsonl.gz, .jsonl.zst, .parquet, .arrow, .txt, .txt.gz or .txt.zst"
_LANGUAGE = re.compile(r"[A-Za-z0-9_-]+")
_SPLIT = re.compile(r"(?:^|_)(clean|noisy)_")
_RATIOS = {".gz": 3.5, ".zst": 4.0, ".parquet": 2.5}


def find_sources(
    inputs: Sequence[str],
    *,
    language: str | None = None,
    split: str | None = None,
    release: str | None = None,
) -> list[Path]:
    """Return the input files in the order in which they are read.

    Args:
        inputs: Files, folders or glob patterns, in order. A folder stands for its files of one
            kind, sorted by name (``.jsonl`` with or without ``.gz`` or ``.zst``, else ``.parquet``,
            else ``.arrow``, else plain text); with ``language`` it is the root of a MADLAD-400
            copy (it holds ``data/`` or ``data-v1p5/``).
        language: Language tag such as ``am``.
        split: ``clean`` or ``noisy``: keep only these MADLAD-400 shards.
        release: ``v1`` (``data/``) or ``v1p5`` (``data-v1p5/``); None where only one is there.

    Raises:
        DataError: A path is missing, a folder is empty, a pattern matches nothing.
        ConfigError: The choice is not clear, or a file has another form or comes twice (by any
            name: links are followed).
    """
    if language is not None and not _LANGUAGE.fullmatch(language):
        raise ConfigError(f"--language must be a language tag such as am, got {language!r}.")
    if language is not None:
        split = split or "clean"
    elif release is not None:
        raise ConfigError("--release needs --language, which says where to look; add it.")
    found: list[Path] = []
    for text in inputs:
        path = Path(text)
        if path.is_dir():
            folder = path if language is None else _language_folder(path, language, release)
            found += _folder_files(folder, split)
        elif language is not None:
            raise DataError(
                f"input {text} is no folder; with --language give the root of a MADLAD-400 copy,"
                " the folder that holds data/ or data-v1p5/."
            )
        elif split is not None:
            raise ConfigError(
                f"--split chooses among the files of a folder, input {text} is none; give the"
                " folder or leave --split out."
            )
        else:
            found += _matching_files(text)
    seen: dict[Path, Path] = {}
    for path in found:
        if not path.name.endswith(SUFFIXES):
            raise ConfigError(
                f"input {path} is not read: expected a name ending in {_FORMATS}; convert it or"
                " name other files."
            )
        if (other := seen.get(path.resolve())) is not None:
            link = "" if other == path else f" (it is also {other})"
            raise ConfigError(f"input {path} is given twice{link}; each file is read once.")
        seen[path.resolve()] = path
    return found


def _language_folder(root: Path, language: str, release: str | None) -> Path:
    folders = {"v1": root / "data" / language, "v1p5": root / "data-v1p5" / language}
    present = [name for name, folder in folders.items() if folder.is_dir()]
    if release is not None:
        if release not in present:
            raise DataError(f"{folders[release]} does not exist; check --language and --release.")
        return folders[release]
    if len(present) == 2:
        raise ConfigError(
            f"{root} holds '{language}' in both releases; choose with --release v1 or"
            " --release v1p5."
        )
    if not present:
        raise DataError(
            f"{root} holds no language '{language}': neither {folders['v1']} nor"
            f" {folders['v1p5']} exists; check --input and --language."
        )
    return folders[present[0]]


def _folder_files(folder: Path, split: str | None) -> list[Path]:
    kinds: dict[str, list[Path]] = {".jsonl": [], ".parquet": [], ".arrow": [], ".txt": []}
    for path in sorted(folder.iterdir()):
        if path.name.endswith(SUFFIXES) and not path.is_dir():
            plain = path.name.removesuffix(".gz").removesuffix(".zst")
            kinds[Path(plain).suffix].append(path)
    records = [kind for kind in (".jsonl", ".parquet", ".arrow") if kinds[kind]]
    if len(records) > 1:
        raise ConfigError(
            f"input folder {folder} holds {' and '.join(records)} files; choose with a pattern"
            f" such as {folder / ('*' + records[0])}."
        )
    files = kinds[records[0] if records else ".txt"]
    if not files:
        raise DataError(
            f"input folder {folder} holds no file to read ({_FORMATS}); check the path, or use"
            " --language for the root of a MADLAD-400 copy."
        )
    for path in files:
        if not path.exists():
            raise DataError(f"input {path} is a link to nothing; copy or download it again.")
    splits = {path: _SPLIT.search(path.name) for path in files}
    names = {match[1] for match in splits.values() if match}
    if split is None:
        if len(names) == 2:
            raise ConfigError(
                f"input folder {folder} holds clean and noisy shards; choose with --split clean"
                " or --split noisy."
            )
        return files
    chosen = [path for path, match in splits.items() if match and match[1] == split]
    if not chosen:
        raise DataError(f"input folder {folder} holds no '{split}' shard; check --split.")
    return chosen


def _matching_files(pattern: str) -> list[Path]:
    path = Path(pattern)
    if path.is_file():
        return [path]
    found = [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]
    files = [path for path in found if path.is_file()]
    if not files:
        if path.is_symlink():
            raise DataError(f"input {pattern} is a link to nothing; copy or download it again.")
        raise DataError(f"input {pattern} does not exist and matches no file; check the path.")
    return files


def estimate_text_bytes(paths: Sequence[Path]) -> int:
    """Return about how many bytes the files hold once decompressed."""
    return sum(int(path.stat().st_size * _RATIOS.get(path.suffix, 1.0)) for path in paths)


def named_dataset(name: str, config: str | None, split: str) -> list[Path]:
    """Return the Arrow files of a dataset from the Hugging Face hub, or of a local folder.

    The files are fetched into the cache of ``datasets`` once; no code from the hub is run.

    Args:
        name: Such as ``allenai/c4``, or a folder that ``datasets.load_dataset`` reads.
        config: Configuration of the dataset, or None.
        split: Such as ``train``.

    Raises:
        DataError: It cannot be had: no network, no such name, or it needs its own code.
    """
    import datasets

    try:
        found = datasets.load_dataset(name, config, split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"dataset {name} cannot be loaded ({type(error).__name__}: {reason}); check name,"
            " --dataset-config, --dataset-split and the network, or copy its files and give them"
            " with --input."
        ) from error
    return [Path(entry["filename"]) for entry in found.cache_files]

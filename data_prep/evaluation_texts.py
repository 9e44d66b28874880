"""Evaluation files whose texts must not be in the training data."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.readers import ReadOptions, SourceReader, is_plain_text
from data_prep.sources import find_sources
from forgetscale.artifact import hash_bytes, hash_file
from forgetscale.data.text import evaluation_ngrams, texts_of
from forgetscale.errors import DataError


def index_evaluation(
    inputs: Sequence[str], ngram: int, folder: Path, read: ReadOptions
) -> tuple[Path | None, dict[str, Any] | None]:
    """Hash the n-grams of evaluation files and keep them in ``folder``.

    Every string in a record counts as a text: questions, answers, messages.

    Args:
        inputs: Files, folders or patterns of the formats that can be trained on.
        ngram: Words of an n-gram.
        folder: Existing folder.
        read: Limits.

    Returns:
        File of sorted hashes and the manifest entry; None, None without inputs.

    Raises:
        DataError: A file is missing or damaged, or no text is long enough.
    """
    if not inputs:
        return None, None
    paths = find_sources(inputs)
    texts = (text for path in paths for text in _texts(path, read))
    hashes, num_texts, num_short = evaluation_ngrams(texts, ngram)
    if not len(hashes):
        raise DataError(
            f"none of the {num_texts} texts in --decontaminate has {ngram} words; lower"
            " --decontaminate-ngram or name other files."
        )
    target = folder / f"evaluation-{hash_bytes(hashes.tobytes())[:16]}.npy"
    temporary = folder / f"{target.stem}.tmp.npy"
    np.save(temporary, hashes)
    temporary.replace(target)
    return target, {
        "ngram": ngram,
        "files": [{"path": str(path), "sha256": hash_file(path)} for path in paths],
        "num_texts": num_texts,
        "num_texts_too_short": num_short,
        "num_ngrams": len(hashes),
    }


def _texts(path: Path, read: ReadOptions) -> Iterator[str]:
    plain = is_plain_text(path)
    with SourceReader(path, replace(read, all_columns=True)) as reader:
        for line in reader.lines():
            try:
                if line.reject:
                    raise ValueError(line.reject)
                text = line.data.decode("utf-8")
                yield from texts_of(text if plain else json.loads(text))
            except ValueError as error:
                raise DataError(
                    f"{path} line {line.number} cannot be read ({error}); evaluation files must"
                    " be sound, or their texts would stay in the training data."
                ) from error

"""``extend-vocabulary``: a model folder with new pieces, ordinary for Hugging Face."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_prep.encoding import load_tokenizer
from data_prep.sources import find_sources
from data_prep.texts import read_texts
from data_prep.vocabulary import NewToken, make_extension
from forgetscale.artifact import ArtifactWriter, hash_file
from forgetscale.data import tokenizer_hash
from forgetscale.errors import ConfigError, DataError
from forgetscale.models import SafetensorsFolder, build_skeleton, read_model_config
from forgetscale.models.weights import INDEX_FILE

KIND = "extended_model"
_STALE = {"tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "merges.txt"}
_COPY_BYTES = 1 << 24
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def mean_rows(folder: SafetensorsFolder, name: str, tokens: Sequence[NewToken]) -> Iterator[Tensor]:
    """Yield the row of each new entry: the mean of its constituents' rows, in fp32.

    Args:
        folder: The old model.
        name: Embedding or head, ``[V, D]``.
        tokens: New entries.

    Source:
        arXiv:2402.09977 (Fast Vocabulary Transfer), section 3; applied to the head as well.
    """
    width = folder.shape(name)[1]
    for token in tokens:
        rows = [
            folder.read_flat(name, number * width, width, torch.float32)
            for number in token.constituents
        ]
        yield torch.stack(rows).mean(0)


def grow_file(
    source: Path,
    target: Path,
    folder: SafetensorsFolder,
    names: set[str],
    tokens: Sequence[NewToken],
    first_id: int,
) -> int:
    """Copy a safetensors file with more rows in some tensors; return the bytes that were added.

    Old bytes are copied as they are, a block at a time; no tensor is held in memory.

    Args:
        source: Old file.
        target: New file.
        folder: The old model, for the rows of constituents.
        names: Tensors ``[V, D]`` that grow; those not in the file are passed over.
        tokens: New entries.
        first_id: Id of the first one. Rows from there on, if any (padding of the vocabulary), are
            replaced.
    """
    with source.open("rb") as old:
        length = int.from_bytes(old.read(8), "little")
        header: dict[str, Any] = json.loads(old.read(length))
        meta = header.pop("__metadata__", None)
        order = sorted(header, key=lambda name: header[name]["data_offsets"][0])
        new_header: dict[str, Any] = {} if meta is None else {"__metadata__": meta}
        place = 0
        for name in order:
            entry = header[name]
            start, end = entry["data_offsets"]
            shape, size = list(entry["shape"]), end - start
            if name in names:
                shape[0] = max(shape[0], first_id + len(tokens))
                size = size // entry["shape"][0] * shape[0]
            new_header[name] = {
                "dtype": entry["dtype"],
                "shape": shape,
                "data_offsets": [place, place + size],
            }
            place += size
        text = json.dumps(new_header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with target.open("wb") as new:
            new.write(len(text).to_bytes(8, "little"))
            new.write(text)
            for name in order:
                start, end = header[name]["data_offsets"]
                rows = header[name]["shape"][0] if header[name]["shape"] else 1
                row_bytes = (end - start) // max(1, rows)
                kept = min(rows, first_id) * row_bytes if name in names else end - start
                _copy(old, new, 8 + length + start, kept)
                if name in names:
                    dtype = _DTYPES[header[name]["dtype"]]
                    for row in mean_rows(folder, name, tokens):
                        new.write(row.to(dtype).view(torch.uint8).numpy().tobytes())
                    past = first_id + len(tokens)
                    if rows > past:
                        _copy(
                            old, new, 8 + length + start + past * row_bytes,
                            (rows - past) * row_bytes,
                        )  # fmt: skip
    return target.stat().st_size - source.stat().st_size


def _copy(old: Any, new: Any, start: int, size: int) -> None:
    old.seek(start)
    while size:
        block = old.read(min(size, _COPY_BYTES))
        assert block, "a safetensors file shorter than its header says"
        new.write(block)
        size -= len(block)


def embedding_names(model: Path) -> set[str]:
    """Return the names of the embedding and, where it is not tied, the head.

    Raises:
        ConfigError: The head has a bias, or the vocabulary size stands elsewhere in the config.
    """
    skeleton = build_skeleton(read_model_config(model, "eager"))
    head, embedding = skeleton.get_output_embeddings(), skeleton.get_input_embeddings()
    if getattr(head, "bias", None) is not None:
        raise ConfigError("extend-vocabulary: the output head has a bias; this is not supported.")
    wanted = {id(head.weight), id(embedding.weight)}
    return {name for name, param in skeleton.named_parameters() if id(param) in wanted}


def extend_vocabulary(
    model: Path, inputs: Sequence[str], num_pieces: int, output: Path
) -> dict[str, Any]:
    """Write the extended model and return the payload of its manifest.

    Args:
        model: Hugging Face folder.
        inputs: Target text.
        num_pieces: Most new entries, >= 1.
        output: Folder to make.

    Raises:
        ConfigError: Model or tokenizer cannot be extended.
        DataError: Input is missing, damaged or too small.
    """
    if num_pieces < 1:
        raise ConfigError(f"--num-pieces must be >= 1, got {num_pieces}.")
    folder = SafetensorsFolder(model)
    names = embedding_names(model)
    config = json.loads((model / "config.json").read_bytes())
    if "vocab_size" not in config:
        raise ConfigError(f"{model / 'config.json'} has no vocab_size at its top level.")
    tokenizer = load_tokenizer(model)
    paths = find_sources(inputs)
    texts = list(read_texts(paths))
    if not texts:
        raise DataError(f"the {len(paths)} input file(s) hold no document; check --input.")
    extension, description = make_extension(tokenizer, texts, num_pieces)
    with ArtifactWriter(output, KIND) as artifact:
        for path in sorted(model.iterdir()):
            if path.is_file() and path.suffix != ".safetensors":
                if path.name not in _STALE | {"manifest.json", INDEX_FILE}:
                    shutil.copyfile(path, artifact.path / path.name)
        text = json.dumps(description, ensure_ascii=False, indent=1)
        (artifact.path / "tokenizer.json").write_text(text, encoding="utf-8")
        size = max(config["vocab_size"], extension.first_id + len(extension.tokens))
        config["vocab_size"] = size
        (artifact.path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        added = sum(
            grow_file(
                model / file,
                artifact.path / file,
                folder,
                names,
                extension.tokens,
                extension.first_id,
            )
            for file in folder.files()
        )
        if (model / INDEX_FILE).is_file():
            index = json.loads((model / INDEX_FILE).read_bytes())
            if "total_size" in index.get("metadata", {}):
                index["metadata"]["total_size"] += added
            (artifact.path / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
        artifact.payload = {
            "first_new_id": extension.first_id,
            "num_new_tokens": len(extension.tokens),
            "vocab_size": size,
            "grown_tensors": sorted(names),
            "rule": "mean_of_constituents",
            "fertility": _gain(tokenizer, artifact.path, texts, extension.first_id),
        }
        artifact.inputs = {
            "tokenizer": tokenizer_hash(model),
            **{file: folder.hash_weight_file(file) for file in folder.files()},
            **{str(path): hash_file(path) for path in paths},
        }
    return artifact.payload


def _gain(old: Any, folder: Path, texts: Sequence[str], first_id: int) -> dict[str, Any]:
    """Return tokens a byte of the target text before and after, and how many entries are used."""
    new = load_tokenizer(folder)
    size = sum(len(text.encode("utf-8")) for text in texts)
    before, after = (
        [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        for tokenizer in (old, new)
    )
    used = np.unique([number for ids in after for number in ids if number >= first_id])
    if not len(used):
        raise ConfigError(
            "extend-vocabulary: AutoTokenizer loads the new tokenizer without its new entries; this"
            " tokenizer class is not supported."
        )
    return {
        "text_bytes": size,
        "tokens_per_byte_before": sum(map(len, before)) / size,
        "tokens_per_byte_after": sum(map(len, after)) / size,
        "num_new_tokens_used": len(used),
    }

"""SafeLoRA: after tuning, project an adapter's factors onto what alignment changed.

``V = W_aligned - W_base``; where ``C dW`` points elsewhere than ``dW``, ``B`` becomes ``C B``. The
published ``C = V V^T / ||V||_F`` is no projector: it is not idempotent and its scale grows with
``V``. ``exact`` projects onto the leading ``rank`` left singular vectors of ``V``; without a rank
onto all its columns, which for the difference of two fully trained models is everything.

Works on folders: an adapter in PEFT's format, two Hugging Face models. One matrix at a time.

Source: arXiv:2405.16833 and its code (``model.py``).

Shape letters: O out features, I in features, R rank of the adapter, K kept directions.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from jaxtyping import Float
from torch import Tensor

from forgetscale.artifact import ArtifactWriter
from forgetscale.checkpoint.export import copy_side_files
from forgetscale.errors import ConfigError, DataError
from forgetscale.models import SafetensorsFolder
from forgetscale.models.weights import INDEX_FILE

Form = Literal["published", "exact"]
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
ADAPTER_KIND, MODEL_KIND = "adapter_export", "model_export"


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter as read from its folder.

    Attributes:
        directory: Its folder.
        scale: What ``B A`` is multiplied with.
        factors: Name of the adapted weight -> ``A`` and ``B``, fp32.
    """

    directory: Path
    scale: float
    factors: Mapping[str, tuple[Tensor, Tensor]]


def read_adapter(directory: Path) -> Adapter:
    """Read a LoRA adapter in PEFT's format.

    Raises:
        DataError: No adapter is there, it is damaged, or of another kind than plain LoRA.
    """
    path = directory / CONFIG_FILE
    if not path.is_file() or not (directory / WEIGHTS_FILE).is_file():
        raise DataError(f"{directory} holds no {CONFIG_FILE} and {WEIGHTS_FILE}; check the path.")
    try:
        config = json.loads(path.read_bytes())
        stored = safetensors.torch.load_file(directory / WEIGHTS_FILE)
    except (ValueError, safetensors.SafetensorError) as error:
        raise DataError(f"{directory} cannot be read as an adapter ({error}).") from error
    special = [k for k in ("use_dora", "rank_pattern", "alpha_pattern") if config.get(k)]
    if config.get("peft_type") != "LORA" or special:
        raise DataError(
            f"{path}: expected plain LoRA, got {config.get('peft_type')} {' '.join(special)};"
            " merge it with PEFT instead."
        )
    rank = int(config["r"])
    scale = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
    factors = {}
    for key in sorted(stored):
        if key.endswith(".lora_A.weight"):
            module = key.removeprefix(_PREFIX).removesuffix(".lora_A.weight")
            other = f"{_PREFIX}{module}.lora_B.weight"
            if other not in stored:
                raise DataError(f"{directory / WEIGHTS_FILE} holds {key} but no {other}.")
            factors[f"{module}.weight"] = (stored[key].float(), stored[other].float())
    if not factors:
        raise DataError(f"{directory / WEIGHTS_FILE} holds no factors of linear layers.")
    return Adapter(directory, float(scale), factors)


def project_factor(
    difference: Float[Tensor, "O I"],
    lora_b: Float[Tensor, "O R"],
    *,
    form: Form,
    rank: int | None = None,
) -> Float[Tensor, "O R"]:
    """Return ``C B``.

    Args:
        difference: ``V = W_aligned - W_base``.
        lora_b: ``B``.
        form: ``published`` is ``V (V^T B) / ||V||_F``, which needs no decomposition; ``exact``
            projects onto left singular vectors of ``V``.
        rank: Directions kept (``exact``); None keeps all that are not zero.
    """
    if form == "published":
        moved: Tensor = difference @ (difference.t() @ lora_b) / difference.norm()
        return moved
    left, singular, _ = torch.linalg.svd(difference, full_matrices=False)
    real = int((singular > torch.finfo(singular.dtype).eps * max(difference.shape)).sum())
    kept = left[:, : real if rank is None else min(rank, real)]
    projected: Tensor = kept @ (kept.t() @ lora_b)
    return projected


def update_cosine(
    lora_a: Float[Tensor, "R I"], first: Float[Tensor, "O R"], second: Float[Tensor, "O R"]
) -> float:
    """Return the cosine between ``first A`` and ``second A`` without forming either; 0 if one is 0.

    Args:
        lora_a: ``A``.
        first: ``B`` of one update.
        second: ``B`` of the other.
    """
    inside = (lora_a @ lora_a.t()).double()

    def product(x: Tensor, y: Tensor) -> float:
        return float((inside * (x.t().double() @ y.double())).sum())

    squares = product(first, first) * product(second, second)
    return product(first, second) / math.sqrt(squares) if squares > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Projected:
    """One adapted matrix: how its update lies, and the factor it would get."""

    name: str
    cosine: float
    lora_b: Tensor


def project_adapter(
    adapter: Adapter,
    aligned: SafetensorsFolder,
    base: SafetensorsFolder,
    *,
    form: Form,
    rank: int | None = None,
    progress: Callable[[str], None] = lambda name: None,
) -> list[Projected]:
    """Return every adapted matrix with its projected ``B`` and the cosine to what it was.

    Args:
        adapter: The adapter.
        aligned: Model it was trained on.
        base: The same before alignment.
        form: See ``project_factor``.
        rank: See ``project_factor``.
        progress: Called with each name.

    Raises:
        DataError: A model lacks a matrix, shapes differ, or the two models are equal there.
    """
    found = []
    for name, (lora_a, lora_b) in adapter.factors.items():
        shape = (lora_b.shape[0], lora_a.shape[1])
        for folder in (aligned, base):
            if folder.shape(name) != shape:
                raise DataError(
                    f"{folder.directory}: {name} has shape {list(folder.shape(name))}, the adapter"
                    f" was made for {list(shape)}; name the models it belongs to."
                )
        difference = aligned.mapped(name).float() - base.mapped(name).float()
        if not bool(difference.any()):
            raise DataError(
                f"{name} is the same in {aligned.directory} and {base.directory}; without a change"
                " by alignment there is nothing to project on. Name the model before alignment."
            )
        moved = project_factor(difference, lora_b, form=form, rank=rank)
        found.append(Projected(name, update_cosine(lora_a, moved, lora_b), moved))
        progress(name)
    return found


def choose_matrices(
    found: Sequence[Projected], *, threshold: float | None, count: int | None
) -> list[str]:
    """Return the matrices to project: those with a cosine up to the threshold.

    Args:
        found: From ``project_adapter``.
        threshold: Largest cosine; None takes that of the ``count``-th smallest, as the code does.
        count: Matrices to project (more where cosines are equal), >= 1.

    Raises:
        ConfigError: Both or neither are given, or there are fewer matrices.
    """
    if (threshold is None) == (count is None):
        raise ConfigError("give one of a threshold and a number of matrices.")
    if threshold is None:
        assert count is not None
        if not 1 <= count <= len(found):
            raise ConfigError(
                f"{count} matrices are to be projected, the adapter has {len(found)}."
            )
        threshold = sorted(item.cosine for item in found)[count - 1]
    return [item.name for item in found if item.cosine <= threshold]


def write_adapter(
    directory: Path, adapter: Adapter, factors: Mapping[str, Tensor], payload: Mapping[str, Any]
) -> Adapter:
    """Write the adapter with other ``B``; return it.

    Args:
        directory: New folder.
        adapter: Adapter that is changed.
        factors: Name of the adapted weight -> its new ``B``.
        payload: Recorded in the manifest.

    Raises:
        DataError: The folder is there already.
    """
    changed = {
        name: (lora_a, factors.get(name, lora_b))
        for name, (lora_a, lora_b) in adapter.factors.items()
    }
    tensors = {}
    for name, (lora_a, lora_b) in changed.items():
        module = _PREFIX + name.removesuffix(".weight")
        tensors[f"{module}.lora_A.weight"] = lora_a.contiguous()
        tensors[f"{module}.lora_B.weight"] = lora_b.contiguous()
    with ArtifactWriter(directory, ADAPTER_KIND) as writer:
        shutil.copyfile(adapter.directory / CONFIG_FILE, writer.path / CONFIG_FILE)
        safetensors.torch.save_file(tensors, writer.path / WEIGHTS_FILE, {"format": "pt"})
        writer.payload = dict(payload)
    return Adapter(directory, adapter.scale, changed)


def merge_adapter(directory: Path, adapter: Adapter, source: SafetensorsFolder) -> None:
    """Write the source model with the adapter's update added, file by file, in its own types.

    Sums are taken in fp32 and rounded once; what is not adapted keeps its bits.

    Args:
        directory: New folder.
        adapter: The adapter.
        source: Model it was trained on.

    Raises:
        DataError: The folder is there already, or the model lacks an adapted matrix.
    """
    for name in adapter.factors:
        source.shape(name)
    dtype = source.mapped(next(iter(adapter.factors))).dtype
    with ArtifactWriter(directory, MODEL_KIND) as writer:
        for file in source.files():
            tensors = {}
            for name in source.names_in(file):
                value = source.mapped(name)
                if name in adapter.factors:
                    lora_a, lora_b = adapter.factors[name]
                    value = (value.float() + adapter.scale * (lora_b @ lora_a)).to(value.dtype)
                tensors[name] = value.contiguous()
            safetensors.torch.save_file(tensors, writer.path / file, {"format": "pt"})
            del tensors
        copy_side_files(source.directory, writer.path, dtype)
        if (source.directory / INDEX_FILE).is_file():
            shutil.copyfile(source.directory / INDEX_FILE, writer.path / INDEX_FILE)
        writer.payload = {"adapter": str(adapter.directory)}

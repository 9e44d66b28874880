"""How far task data pull a model from its own style, and how far training has moved it.

Three questions, each a number with its parts:

- *Surprise*: mean negative log-likelihood of the targets of each data set under the source model.
  What a model writes itself surprises it least; the difference to the task's is the part of the
  gradient that teaches style rather than content.
- *Alignment*: cosine between the gradients of the mean loss of two sets at the same weights, whole
  and by layer. Below 0 a step for one set undoes the other.
- *Drift*: ``||theta - theta0||_F / ||theta0||_F``, whole and by tensor.

Source: arXiv:2602.20162 for the claim that style drives forgetting; the measures are ours.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from forgetscale.artifact import write_json
from forgetscale.config import Recipe
from forgetscale.data import TokenSet, open_data
from forgetscale.errors import ConfigError, DataError
from forgetscale.generation.loading import load_causal_model
from forgetscale.ops import IGNORE_INDEX
from forgetscale.ops.losses import cross_entropy

STYLE_FILE = "style.json"
_LAYER = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")


def documents_of(token_set: TokenSet, rows: Iterable[int]) -> list[tuple[Tensor, Tensor]]:
    """Return ids ``[1, T]`` and labels ``[1, T]`` of every document of some rows.

    Args:
        token_set: SFT rows, or text whose every token is a target.
        rows: Row numbers.
    """
    found = []
    for row in rows:
        ids = token_set.read([row])[0]
        mask = token_set.loss_mask([row])[0] if token_set.is_supervised else ids >= 0
        start = 0
        for size in [item for item in token_set.document_lens([row])[0].tolist() if item]:
            part = slice(start, start + size)
            labels = torch.where(mask[part], ids[part], IGNORE_INDEX)
            labels[0] = IGNORE_INDEX
            found.append((ids[part][None], labels[None]))
            start += size
    return found


def _loss(model: Any, ids: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    """Return the summed loss of a document in nats, and its number of targets."""
    device = model.device
    logits = model(input_ids=ids.to(device)).logits[0, :-1]
    wanted = labels[0, 1:].to(device)
    return cross_entropy(logits, wanted), int((wanted != IGNORE_INDEX).sum())


@torch.no_grad()
def mean_nll(model: Any, documents: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Return the mean negative log-likelihood of target tokens, in nats.

    Args:
        model: Causal language model.
        documents: From ``documents_of``; at least one target.
    """
    parts = [_loss(model, ids, labels) for ids, labels in documents]
    return math.fsum(float(value) for value, _ in parts) / sum(count for _, count in parts)


def mean_gradient(model: Any, documents: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Return the gradient of the mean loss, by parameter, fp32 on the CPU.

    Args:
        model: Causal language model; its gradients are cleared.
        documents: From ``documents_of``; at least one target.
    """
    model.zero_grad(set_to_none=True)
    total = 0
    for ids, labels in documents:
        value, count = _loss(model, ids, labels)
        value.backward()  # type: ignore[no-untyped-call]
        total += count
    found = {
        name: parameter.grad.detach().float().cpu() / total
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    model.zero_grad(set_to_none=True)
    return found


def layer_of(name: str) -> str:
    """Return the layer a parameter belongs to: its number, or ``other``."""
    match = _LAYER.search(f".{name}")
    return match[1] if match else "other"


def gradient_cosine(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the cosine between two gradients, for each layer and under ``all``.

    Args:
        one: By parameter name.
        other: With the same names.

    Raises:
        ValueError: The names differ.
    """
    if one.keys() != other.keys():
        raise ValueError("the two gradients are of different parameters")
    sums: dict[str, list[float]] = {}
    for name, first in one.items():
        second = other[name]
        numbers = [
            float((a.double() * b.double()).sum())
            for a, b in ((first, second), (first, first), (second, second))
        ]
        for group in (layer_of(name), "all"):
            held = sums.setdefault(group, [0.0, 0.0, 0.0])
            for place, number in enumerate(numbers):
                held[place] += number
    return {
        group: product / math.sqrt(left * right) if left > 0 and right > 0 else 0.0
        for group, (product, left, right) in sums.items()
    }


def parameter_drift(source: Path, tuned: Path) -> dict[str, float]:
    """Return the relative distance of each tensor of two model folders, and under ``all``.

    Tensor by tensor: never a whole model in memory.

    Args:
        source: Folder before training.
        tuned: Folder after it, of the same architecture.

    Raises:
        DataError: The folders hold different tensors.
    """
    before, after = _tensor_files(source), _tensor_files(tuned)
    if before.keys() != after.keys():
        different = sorted(before.keys() ^ after.keys())[0]
        raise DataError(f"only one of {source} and {tuned} holds the tensor {different}.")
    found: dict[str, float] = {}
    moved = whole = 0.0
    for name, path in before.items():
        old, new = _read(path, name), _read(after[name], name)
        if old.shape != new.shape:
            raise DataError(
                f"{name} is {tuple(old.shape)} in {source} and {tuple(new.shape)} in {tuned}."
            )
        distance, size = float((new - old).square().sum()), float(old.square().sum())
        found[name] = math.sqrt(distance / size) if size > 0 else math.inf if distance else 0.0
        moved, whole = moved + distance, whole + size
    return found | {"all": math.sqrt(moved / whole)}


def _tensor_files(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= dict.fromkeys(file.keys(), path)
    return found


def _read(path: Path, name: str) -> Tensor:
    with safe_open(path, framework="pt") as file:
        tensor: Tensor = file.get_tensor(name)
    return tensor.double()


def measure_style(
    recipe: Recipe, output: Path, *, tuned: Path | None = None, num_rows: int = 64
) -> dict[str, Any]:
    """Measure the sets of a training recipe under its source model; write ``style.json``.

    Args:
        recipe: With a mixture, such as task and self-written data.
        output: Folder that receives the file.
        tuned: Model folder after training, for drift; None: no drift.
        num_rows: First rows used of each set, > 0.

    Returns:
        ``nll`` by set, ``excess_nll`` over the set that surprises least, ``cosine`` by pair of
        sets and layer, ``drift`` by tensor.

    Raises:
        ConfigError: There is one set only.
    """
    data = open_data(recipe.data, recipe.model.path)
    if len(data.parts) < 2:
        raise ConfigError("style is measured between sets: give data of kind mixture.")
    model = load_causal_model(recipe.model)
    documents = {
        part.name: documents_of(part.token_set, range(min(num_rows, part.token_set.num_rows)))
        for part in data.parts
    }
    nll = {name: mean_nll(model, found) for name, found in documents.items()}
    gradients = {name: mean_gradient(model, found) for name, found in documents.items()}
    names = list(documents)
    pairs = [(a, b) for n, a in enumerate(names) for b in names[n + 1 :]]
    result: dict[str, Any] = {
        "model": recipe.model.path.name,
        "num_rows": num_rows,
        "nll": nll,
        "excess_nll": {name: value - min(nll.values()) for name, value in nll.items()},
        "gradient_norm": {
            name: math.sqrt(sum(float(part.double().square().sum()) for part in found.values()))
            for name, found in gradients.items()
        },
        "cosine": {f"{a}|{b}": gradient_cosine(gradients[a], gradients[b]) for a, b in pairs},
    }
    if tuned is not None:
        result["drift"] = parameter_drift(recipe.model.path, tuned)
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / STYLE_FILE, result)
    return result

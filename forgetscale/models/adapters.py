"""Linear layers with low-rank factors beside a frozen weight, built for ZeRO-3.

A layer owns its weight and its factors, so ZeRO-3 gathers the three at once, before forward and
before backward. Base weights keep the names they have in the source model. PEFT's layers do
neither: they rename every adapted weight, keep factors in modules of their own (two more gathers a
layer), and AdaLoRA's in ``ParameterDict`` s that are never called, so that ZeRO-3 never gathers
them. What is exported has PEFT's format.

Shape letters: N flattened positions, O out features, I in features, R rank.
"""

from __future__ import annotations

import difflib
import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from forgetscale.errors import ConfigError
from forgetscale.masks import AdapterPair
from forgetscale.masks.adapters import FACTOR_E

ALL_LINEAR = "all-linear"
Init = Literal["kaiming", "gaussian", "svd"]
SVD_DEVIATION = 0.02
_DRAWS_PER_COUNT = 4
"""Numbers that one count of Philox 4x64 gives."""


class LoraLinear(nn.Module):
    """``x W^T + b + scale * (x A^T) B^T`` with ``W`` and ``b`` frozen; ``(x A^T) diag(E)`` for SVD.

    Args:
        linear: The layer to adapt; its parameters are taken over.
        pair: Rank, scale and dropout.
    """

    lora_E: nn.Parameter | None

    def __init__(self, linear: nn.Linear, pair: AdapterPair) -> None:
        super().__init__()
        self.out_features, self.in_features = pair.shape
        self.rank, self.scale = pair.rank, pair.scale
        self.dropout = nn.Dropout(pair.dropout) if pair.dropout else None
        kind = linear.weight.dtype
        self.lora_A = nn.Parameter(torch.empty(pair.rank, self.in_features, dtype=kind))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, pair.rank, dtype=kind))
        values = nn.Parameter(torch.empty(pair.rank, 1, dtype=kind)) if pair.has_values else None
        self.register_parameter(FACTOR_E, values)

    def take_over(self, linear: nn.Linear) -> None:
        """Own the parameters of the layer that is replaced.

        Apart from ``__init__``, so that ``zero.Init`` sees only new parameters in it.
        """
        self.weight, self.bias = linear.weight, linear.bias
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)

    def extra_repr(self) -> str:
        """Describe the layer as ``nn.Linear`` does."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features},"
            f" bias={self.bias is not None}, rank={self.rank}, scale={self.scale:g}"
        )

    def forward(self, x: Float[Tensor, "... I"]) -> Float[Tensor, "... O"]:
        """Multiply; the update is added within the second product."""
        seen = x if self.dropout is None else self.dropout(x)
        low = nn.functional.linear(seen, self.lora_A).flatten(0, -2)
        if self.lora_E is not None:
            low = low * self.lora_E.flatten()
        base = nn.functional.linear(x, self.weight, self.bias)
        y = torch.addmm(base.flatten(0, -2), low, self.lora_B.t(), alpha=self.scale)
        return y.view(base.shape)


def adapter_pairs(
    structure: Any,
    target_modules: Literal["all-linear"] | Sequence[str],
    *,
    rank: int,
    scale: float,
    dropout: float,
    has_values: bool = False,
) -> dict[str, AdapterPair]:
    """Return the factor pairs of a model by the adapted matrix, in the model's order.

    Args:
        structure: Hugging Face model, or its skeleton on the meta device.
        target_modules: ``all-linear``, or ends of module names (whole parts between dots).
        rank: Rank of every pair, > 0.
        scale: What ``B A`` is multiplied with.
        dropout: Share of inputs that ``A`` does not see in training.
        has_values: Singular values stand between the factors.

    Raises:
        ConfigError: A name matches no linear layer, or the output head; the rank exceeds a matrix.
    """
    head = structure.get_output_embeddings()
    linear = {n: m for n, m in structure.named_modules() if type(m) is nn.Linear}
    body = {name: module for name, module in linear.items() if module is not head}
    if target_modules == ALL_LINEAR:
        chosen = list(body)
    else:
        _require_targets(target_modules, linear, body)
        chosen = [n for n in body if any(_is_end(end, n) for end in target_modules)]
    found = {}
    for name in chosen:
        out_features, in_features = tuple(body[name].weight.shape)
        if rank > min(out_features, in_features):
            raise ConfigError(
                f"adapter.rank is {rank}, but {name} has {out_features} out and {in_features} in"
                " features; choose a rank up to the smaller one, or leave the layer out of"
                " adapter.target_modules."
            )
        matrix = f"{name}.weight"
        shape = (out_features, in_features)
        found[matrix] = AdapterPair(matrix, shape, rank, scale, dropout, has_values)
    return found


def _is_end(end: str, name: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _require_targets(
    ends: Sequence[str], linear: Mapping[str, nn.Module], body: Mapping[str, nn.Module]
) -> None:
    leaves = sorted({name.rpartition(".")[2] for name in body})
    for end in ends:
        if any(_is_end(end, name) for name in body):
            continue
        if any(_is_end(end, name) for name in linear):
            raise ConfigError(
                f"adapter.target_modules names {end!r}, the output head, which is not adapted: its"
                " weight is gathered once with the loss; name layers of the body."
            )
        near = difflib.get_close_matches(end, [*leaves, *body], n=1)
        hint = f"nearest: {near[0]}" if near else f"there are {', '.join(leaves)}"
        raise ConfigError(
            f"adapter.target_modules: {end!r} matches no linear layer of the model ({hint})."
        )


def make_adapters(model: Any, adapters: Mapping[str, AdapterPair]) -> None:
    """Replace the layers that are adapted, in place; factors are left unset.

    Under ``zero.Init`` the factors are partitioned as they are made.

    Args:
        model: Hugging Face causal language model.
        adapters: From ``adapter_pairs``.
    """
    for pair in adapters.values():
        old = model.get_submodule(pair.module)
        new = LoraLinear(old, pair)
        new.take_over(old)
        parent, _, leaf = pair.module.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new)


def uniform_slice(key: str, start: int, length: int) -> Float[Tensor, " length"]:
    """Return numbers ``start .. start + length`` of a stream of uniform draws in (0, 1), fp64.

    The stream is a function of the key alone (Philox 4x64-10 counts, numpy): any slice is drawn
    without what comes before, so the values do not depend on how many ranks draw them.

    Args:
        key: Names the stream.
        start: First number, >= 0.
        length: How many, >= 0.
    """
    digest = hashlib.sha256(key.encode()).digest()
    generator = np.random.Philox(key=int.from_bytes(digest[:16], "little"))
    generator.advance(start // _DRAWS_PER_COUNT)
    skip = start % _DRAWS_PER_COUNT
    raw = generator.random_raw(skip + length)[skip:]
    return torch.from_numpy(((raw >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53)


def initial_values(
    pair: AdapterPair, name: str, start: int, length: int, *, seed: int, init: Init
) -> Float[Tensor, " length"]:
    """Return first values of a slice of a flattened factor, fp32.

    Args:
        pair: The pair.
        name: Name of one of its factors.
        start: First element of the slice.
        length: Elements of the slice.
        seed: ``run.seed``.
        init: ``kaiming``: uniform in ``+-1 / sqrt(I)`` as PEFT draws; ``gaussian``: normal with
            deviation ``1 / R``. ``B`` is zero either way. ``svd``: normal with deviation 0.02 for
            both, ``E`` is zero.
    """
    if name == pair.lora_E or (name == pair.lora_B and init != "svd"):
        return torch.zeros(length)
    uniform = uniform_slice(f"forgetscale/adapter/{seed}/{name}", start, length)
    if init in ("gaussian", "svd"):
        deviation = SVD_DEVIATION if init == "svd" else 1.0 / pair.rank
        values: Tensor = torch.special.ndtri(uniform) * deviation
    else:
        values = (2.0 * uniform - 1.0) / math.sqrt(pair.shape[1])
    return values.float()

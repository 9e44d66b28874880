"""Floating-point operations per token, and what share of a machine's rate a run reaches."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from forgetscale.masks import CompactLayout

DENSE_BF16_RATES = {"A100": 312e12, "H100": 989.4e12, "H200": 989.4e12, "B200": 2250e12}
"""Operations per second of the tensor cores without sparsity, from NVIDIA's data sheets (SXM)."""


def multiplied_names(skeleton: Any) -> list[str]:
    """Return the matrices that tokens are multiplied with: linear layers and the output head."""
    head = skeleton.get_output_embeddings().weight
    wanted = {id(m.weight) for m in skeleton.modules() if isinstance(m, nn.Linear)} | {id(head)}
    return [n for n, p in skeleton.named_parameters() if id(p) in wanted and p.dim() == 2]


def model_flops_per_token(skeleton: Any, layout: CompactLayout | None, block: int) -> int:
    """Return the operations that forward and backward need per token, recomputation left out.

    Two per weight for the output, two for the gradient of the input, two for the gradient of each
    weight that has one: a compact layout computes none for frozen columns or rows, an adapter none
    for the weights beside its factors. Causal attention adds
    ``6 * layers * heads * head size * block``. The gradients of the first layer's inputs are
    counted although nothing needs them where the embedding is frozen.

    Args:
        skeleton: Source model on the meta device.
        layout: How the freeze plan is stored, or None.
        block: Tokens of a row.
    """
    params = dict(skeleton.named_parameters())
    cut = {} if layout is None else layout.matrices()
    whole = frozenset() if layout is None else layout.plan.whole
    total = 0
    for name in multiplied_names(skeleton):
        numel = params[name].numel()
        trained = 0 if name in whole else numel
        if layout is not None and name in cut:
            trained = math.prod(layout.pieces[cut[name][1]].stored_shape)
        total += 4 * numel + 2 * trained
    factors = {} if layout is None else layout.factors()
    total += 6 * sum(math.prod(shape) for shape in factors.values())
    config = skeleton.config
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return int(total + 6 * config.num_hidden_layers * heads * size * block)


def utilization(flops_per_token: float, tokens_per_second: float, rate: float) -> float:
    """Return the share of a machine's rate that a run reaches.

    With ``model_flops_per_token`` this is the model's utilisation (MFU, arXiv:2204.02311); with
    the operations executed, recomputation included, the hardware's (HFU).

    Args:
        flops_per_token: Operations per token.
        tokens_per_second: Tokens per second of all ranks.
        rate: Operations per second of all ranks, > 0.
    """
    if rate <= 0:
        raise ValueError(f"rate must be > 0, got {rate}")
    return flops_per_token * tokens_per_second / rate


def dense_rate(device_name: str) -> float | None:
    """Return the bf16 rate of a GPU by its name, or None for one that is not listed."""
    for name, rate in DENSE_BF16_RATES.items():
        if name in device_name:
            return rate
    return None

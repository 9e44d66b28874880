"""Attention that does not cross document borders inside a packed row.

How transformers (read at 5.23) learns about documents, by attention implementation:

- ``sdpa``, ``eager``: ``masking_utils`` sees positions that restart, for any number of rows, and
  builds a block-diagonal causal mask ``[B, 1, T, T]``; sliding windows stay right;
- ``flash_attention_*``: positions are looked at only where the batch is one row; with more rows
  they are ignored *without a word*. The variable-length kernel is used for any number of rows
  where ``cu_seq_lens_*`` and ``max_length_*`` are given, so these are computed here, once a
  forward pass instead of once a layer.

An architecture that drops these arguments would attend across documents silently; ``document_leak``
measures it before training.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from forgetscale.errors import ConfigError

LEAK_TOLERANCE = 1e-3
_PROBE_SPLIT = 5


def document_arguments(
    attn_implementation: str | None, position_ids: Int64[Tensor, "B T"]
) -> dict[str, Any]:
    """Return what the decoder's ``forward`` needs to keep documents apart.

    Args:
        attn_implementation: Attention code of the model.
        position_ids: Positions that restart at 0 with each document; each row starts at 0.
    """
    arguments: dict[str, Any] = {"position_ids": position_ids}
    if attn_implementation is not None and attn_implementation.startswith("flash_attention"):
        flat = position_ids.reshape(-1)
        starts = (flat == 0).nonzero().view(-1)
        borders = torch.cat([starts, starts.new_tensor([len(flat)])]).to(torch.int32)
        longest = int(borders.diff().max())
        arguments |= {
            "cu_seq_lens_q": borders,
            "cu_seq_lens_k": borders,
            "max_length_q": longest,
            "max_length_k": longest,
        }
    return arguments


@torch.no_grad()
def check_document_mask(
    score: Callable[[Tensor, Tensor | None], Float[Tensor, "B targets"]],
    vocab_size: int,
    device: torch.device,
) -> None:
    """Check on a probe that a change in one document moves no score in the next one.

    Args:
        score: ``(input_ids, position_ids or None) -> nll`` of each target. Collective where the
            model is.
        vocab_size: Ids are below it, >= 2.
        device: Where the probe is made.

    Raises:
        ConfigError: The model attends across document borders.
    """
    split = _PROBE_SPLIT
    ids = (torch.arange(2 * split, device=device) % vocab_size).expand(2, -1).clone()
    positions = (torch.arange(2 * split, device=device) % split).expand(2, -1)
    other = ids.clone()
    other[:, :split] = (ids[:, :split] + 1 + ids[:, :split] % 2) % vocab_size
    # Targets from ``split`` on are predicted from inside the second document.
    moved = (score(ids, positions) - score(other, positions))[:, split:].abs().max()
    free = (score(ids, None) - score(other, None))[:, split:].abs().max()
    if not float(moved) <= LEAK_TOLERANCE * float(free):
        raise ConfigError(
            "data.document_mask: this model with its model.attn_implementation attends across"
            f" documents (a change in one moves the next by {float(moved):.3g} nats, without mask"
            f" {float(free):.3g}); set model.attn_implementation: sdpa or data.document_mask:"
            " false."
        )

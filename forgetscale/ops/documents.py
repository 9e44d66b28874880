"""Documents inside packed rows: positions that restart, labels that do not cross a border.

Shape letters: R rows, P document pieces of the row with most of them, T positions.
``doc_lens`` holds the tokens of each piece, zeros after the last one; what the row has beyond
their sum is padding.
"""

from __future__ import annotations

import torch
from jaxtyping import Int64
from torch import Tensor

from forgetscale.ops import IGNORE_INDEX


def document_positions(
    doc_lens: Int64[Tensor, "R P"], num_positions: int
) -> Int64[Tensor, "R {num_positions}"]:
    """Return the place of each token in its document; padding counts as one more document.

    Args:
        doc_lens: Tokens of each piece.
        num_positions: Length of a row, at least the largest sum of lengths.

    Raises:
        ValueError: A length is negative, or a row holds more than ``num_positions`` tokens.
    """
    ends = doc_lens.cumsum(1)
    if doc_lens.numel() and (int(doc_lens.min()) < 0 or int(ends[:, -1].max()) > num_positions):
        raise ValueError(
            f"document lengths must be >= 0 and sum to at most {num_positions} in each row"
        )
    starts = torch.cat([ends.new_zeros(len(ends), 1), ends], 1)
    places = torch.arange(num_positions, device=doc_lens.device).expand(len(ends), -1)
    number = torch.searchsorted(ends, places.contiguous(), right=True)
    return places - starts.gather(1, number)


def packed_labels(
    input_ids: Int64[Tensor, "R T"], doc_lens: Int64[Tensor, "R P"], *, document_mask: bool
) -> Int64[Tensor, "R T"]:
    """Return the targets of packed rows, aligned with ``input_ids``.

    Args:
        input_ids: Token ids.
        doc_lens: Tokens of each piece.
        document_mask: The first token of a document is no target, because nothing that may be
            seen stands before it. Without it, the last token of one document predicts the first
            of the next, as in the paper's concatenated text.

    Returns:
        ``input_ids`` with ``IGNORE_INDEX`` at padding and, if asked for, at document starts.
    """
    num_real = doc_lens.sum(1, keepdim=True)
    places = torch.arange(input_ids.shape[1], device=input_ids.device)
    ignored = places >= num_real
    if document_mask:
        ignored |= document_positions(doc_lens, input_ids.shape[1]) == 0
    return input_ids.masked_fill(ignored, IGNORE_INDEX)

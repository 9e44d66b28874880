"""The one thing in-loop evaluation asks of a model: how likely are these tokens?

A live ZeRO-3 engine and a plain transformers model both answer it with ordinary forward calls.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

_CHUNK_ELEMENTS = 1 << 24


class LikelihoodModel(Protocol):
    """Scores given tokens; never generates."""

    def score(
        self,
        input_ids: Int[Tensor, "batch length"],
        attention_mask: Int[Tensor, "batch length"],
    ) -> tuple[Float[Tensor, "batch targets"], Bool[Tensor, "batch targets"]]:
        """Score each token given the tokens before it. One forward call.

        Collective on a sharded model: every rank must call it the same number of times; shapes
        may differ between ranks.

        Args:
            input_ids: int64 on CPU, padded on the right.
            attention_mask: int64, 1 for tokens and 0 for padding.

        Returns:
            ``nll`` fp32 and ``is_argmax`` bool, both ``[batch, length - 1]`` on CPU. Entry ``t``
            is about token ``t + 1``: its negative log-likelihood in nats, and whether it is the
            most likely token there. Entries at padding are arbitrary.
        """
        ...


def nll_and_argmax(
    logits: Float[Tensor, "positions vocab"], targets: Int[Tensor, " positions"]
) -> tuple[Float[Tensor, " positions"], Bool[Tensor, " positions"]]:
    """Score targets under logits, in fp32.

    Args:
        logits: Any float dtype; converted to fp32 here, so pass a chunk of positions at a time.
        targets: Token ids.

    Returns:
        Negative log-likelihood in nats, and whether the target is the argmax. Ties go where
        ``argmax`` sends them, as in greedy decoding.
    """
    scores = logits.float()
    chosen = scores.gather(1, targets[:, None])[:, 0]
    return torch.logsumexp(scores, dim=1) - chosen, scores.argmax(dim=1) == targets


class HuggingFaceLikelihood:
    """``LikelihoodModel`` on a plain transformers causal language model.

    The head is applied to a few positions at a time, so that ``[batch x length, vocab]`` never
    exists in fp32. A model whose logits are more than ``head(decoder(x))`` (soft-capping,
    scaling) is recognised by comparing both on a probe; for it the whole logits are made in the
    model's dtype and converted in chunks.

    Args:
        model: ``AutoModelForCausalLM`` in evaluation mode.
        chunk_elements: Most fp32 logits held at once.
    """

    def __init__(self, model: Any, *, chunk_elements: int = _CHUNK_ELEMENTS) -> None:
        self._model = model
        self._decoder: nn.Module = model.get_decoder()
        self._head: nn.Module = model.get_output_embeddings()
        self._chunk_elements = chunk_elements
        self._plain_head = self._head_is_plain()

    @torch.no_grad()
    def _head_is_plain(self) -> bool:
        vocab = int(self._model.config.vocab_size)
        probe = torch.arange(min(4, vocab), device=self._model.device)[None]
        whole = self._model(input_ids=probe, use_cache=False).logits
        hidden = self._decoder(input_ids=probe, use_cache=False).last_hidden_state
        return torch.equal(whole, self._head(hidden))

    @torch.no_grad()
    def score(
        self,
        input_ids: Int[Tensor, "batch length"],
        attention_mask: Int[Tensor, "batch length"],
    ) -> tuple[Float[Tensor, "batch targets"], Bool[Tensor, "batch targets"]]:
        """Score each token given the tokens before it; see ``LikelihoodModel.score``."""
        device = self._model.device
        ids = input_ids.to(device)
        mask = attention_mask.to(device)
        if self._plain_head:
            output = self._decoder(input_ids=ids, attention_mask=mask, use_cache=False)
            features = output.last_hidden_state
        else:
            features = self._model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        features = features[:, :-1].flatten(0, 1)
        targets = ids[:, 1:].flatten()
        rows = max(1, self._chunk_elements // int(self._model.config.vocab_size))
        nll, is_argmax = [], []
        for part, wanted in zip(
            torch.split(features, rows), torch.split(targets, rows), strict=True
        ):
            logits = self._head(part) if self._plain_head else part
            part_nll, part_argmax = nll_and_argmax(logits, wanted)
            nll.append(part_nll)
            is_argmax.append(part_argmax)
        shape = (input_ids.shape[0], input_ids.shape[1] - 1)
        return torch.cat(nll).view(shape).cpu(), torch.cat(is_argmax).view(shape).cpu()

"""The module that is trained: a causal language model with its loss, logits never whole.

Shape letters: B sequences, T positions, N flattened positions, D model width, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from forgetscale.errors import ConfigError
from forgetscale.models.compact import CompactLinear
from forgetscale.models.documents import document_arguments
from forgetscale.ops.losses import LossFunction, LossRecord, chunked_loss, token_scores
from forgetscale.ops.observe import Columns, Observer, observe_tokens

HEAD_CHECK_POSITIONS = 8
HEAD_CHECK_TOLERANCE = 2e-2


class LossHead(nn.Module):
    """Output head and loss in one module, so that ZeRO-3 gathers the head's weight once.

    Args:
        linear: Output embeddings of the model; its parameters are shared, not copied.
        chunk_size: Positions whose logits exist at one time.
    """

    def __init__(self, linear: nn.Linear | CompactLinear, chunk_size: int) -> None:
        super().__init__()
        self.bias = linear.bias
        self.chunk_size = chunk_size
        self._compact: CompactLinear | None = None
        if isinstance(linear, CompactLinear):
            self.frozen, self.trainable = linear.frozen, linear.trainable
            # Not a submodule: this module owns its parameters, so that ZeRO-3 gathers them here.
            object.__setattr__(self, "_compact", linear)
        else:
            self.weight = linear.weight

    def _head(self) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        if self._compact is None:
            return self.weight, None
        assert self._compact.axis == "row"
        return self._compact.assemble(), (self.trainable, self._compact.trainable_index)

    def forward(
        self,
        hidden: Float[Tensor, "N D"],
        labels: Int64[Tensor, " N"],
        loss: LossFunction | Observer | None,
        record: LossRecord | None = None,
        extra: Mapping[str, Tensor] | None = None,
        *,
        whole: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor] | Columns:
        """Return the summed loss, per-position scores for None, or what an observer notes.

        ``whole`` returns the logits themselves: for a few positions only.
        """
        weight, rows = self._head()
        if whole:
            return nn.functional.linear(hidden, weight, self.bias)
        if isinstance(loss, Observer):
            size = self.chunk_size
            return observe_tokens(hidden, weight, labels, loss, bias=self.bias, chunk_size=size)
        if loss is None:
            return token_scores(hidden, weight, labels, bias=self.bias, chunk_size=self.chunk_size)
        return chunked_loss(
            hidden,
            weight,
            labels,
            loss,
            bias=self.bias,
            trained_rows=rows,
            chunk_size=self.chunk_size,
            record=record,
            extra=extra,
        )


class CausalLMWithLoss(nn.Module):
    """Decoder, head and loss behind one ``forward``, the unit that DeepSpeed wraps.

    Args:
        model: Hugging Face causal language model; parameter names inside start with ``model.``.
        chunk_size: Positions whose logits exist at one time.

    Raises:
        ConfigError: The model has no linear output head.
    """

    PREFIX = "model."

    def __init__(self, model: Any, chunk_size: int) -> None:
        super().__init__()
        head = model.get_output_embeddings()
        if not isinstance(head, nn.Linear | CompactLinear):
            raise ConfigError(
                f"model: the output head is {type(head).__name__}, expected a linear layer;"
                " this architecture is not supported."
            )
        self.model: Any = model
        self.head: Any = LossHead(head, chunk_size)

    @contextlib.contextmanager
    def input_gradients(self) -> Iterator[None]:
        """Let gradients flow through a model whose parameters need none, in evaluation mode.

        Layers for which activation checkpointing was enabled recompute as in training: they look at
        their own training flag, their parts (dropout) keep theirs.
        """
        layers = [
            module
            for module in self.model.modules()
            if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing
        ]
        self.model.enable_input_require_grads()
        for layer in layers:
            layer.training = True
        try:
            yield
        finally:
            for layer in layers:
                layer.training = False
            self.model.disable_input_require_grads()

    def hidden_states(
        self, input_ids: Int64[Tensor, "B T"], position_ids: Int64[Tensor, "B T"] | None = None
    ) -> Float[Tensor, "B T D"]:
        """Return the last hidden states (after the final norm).

        Args:
            input_ids: Token ids.
            position_ids: Places that restart with each document, which then are kept apart; None:
                each row is one text.
        """
        documents = {}
        if position_ids is not None:
            attention = self.model.config._attn_implementation
            documents = document_arguments(attention, position_ids)
        hidden: Tensor = self.model.base_model(
            input_ids=input_ids, use_cache=False, **documents
        ).last_hidden_state
        return hidden

    def forward(
        self,
        input_ids: Int64[Tensor, "B T"],
        labels: Int64[Tensor, "B T"] | None = None,
        loss: LossFunction | Observer | None = None,
        mode: Literal["loss", "score", "next", "body", "logits"] = "loss",
        position_ids: Int64[Tensor, "B T"] | None = None,
        record: LossRecord | None = None,
        extra: Mapping[str, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor] | Columns:
        """Run the model.

        Args:
            input_ids: Token ids.
            labels: Ids aligned with ``input_ids``; position ``t`` is the target of ``t - 1``.
                ``IGNORE_INDEX`` marks positions without loss.
            loss: Loss function for ``mode="loss"``, or an ``Observer``, whose columns over the
                positions with a target are then returned.
            mode: ``loss`` returns the summed loss; ``score`` per-position negative
                log-likelihoods and argmax hits ``[B, T-1]``; ``next`` the logits ``[B, V]``
                behind the last token of each row, whose lengths ``[B]`` stand in ``labels``;
                ``body`` the hidden states (for hooks); ``logits`` the model's own logits (short
                inputs only).
            position_ids: See ``hidden_states``; not for ``mode="logits"``.
            record: Adds up the sums beside the loss, for ``mode="loss"``.
            extra: ``[B, T, ...]`` by name, aligned with ``labels``: what the loss needs beside
                logits and labels.
        """
        if mode == "logits":
            logits: Tensor = self.model(input_ids=input_ids, use_cache=False).logits
            return logits
        hidden = self.hidden_states(input_ids, position_ids)
        if mode == "body":
            return hidden
        assert labels is not None
        if mode == "next":
            last = hidden[torch.arange(len(hidden), device=hidden.device), labels - 1]
            behind: Tensor = self.head(last, labels, None, whole=True)
            return behind
        flat = hidden[:, :-1].reshape(-1, hidden.shape[-1])
        targets = labels[:, 1:].reshape(-1)
        if mode == "score":
            nll, best = self.head(flat, targets.clamp_min(0), None)
            shape = (labels.shape[0], labels.shape[1] - 1)
            return nll.view(shape), best.view(shape)
        more = {name: item[:, 1:].flatten(0, 1) for name, item in (extra or {}).items()}
        value: Tensor | Columns = self.head(flat, targets, loss, record, more)
        return value


@torch.no_grad()
def check_head(scores: tuple[Tensor, Tensor], logits: Tensor, input_ids: Tensor) -> None:
    """Check that head(hidden) is what the model itself computes.

    Some architectures scale or cap their logits after the head; training those through the plain
    head would optimise another model without a word.

    Args:
        scores: ``score`` output for ``input_ids``.
        logits: ``logits`` output for ``input_ids``.
        input_ids: ``[B, T]`` with small ``T``.

    Raises:
        ConfigError: The two disagree.
    """
    log_probs = torch.log_softmax(logits[:, :-1].float(), -1)
    expected = -log_probs.gather(2, input_ids[:, 1:, None])[..., 0]
    error = float((scores[0] - expected).abs().max() / expected.abs().max().clamp_min(1e-6))
    if not error <= HEAD_CHECK_TOLERANCE:
        raise ConfigError(
            "model: logits are not the output head applied to the last hidden state (relative"
            f" difference {error:.3g}); this architecture changes logits after the head and is not"
            " supported."
        )

"""A testbed world as one process sees it: model, data, tasks, and a fast training run with masks.

Made for trying many freeze rules: plain torch, one flat tensor of parameters, dense masks. Matrix
products of the training step run in bf16 (statistics and measurements in fp32), which nearly
halves its time on processors with bf16 instructions. Recipe of the optimizer: that of
``forgetscale.cli.miniature`` but for the peak rate and the number of steps.

Shape letters: B sequences, T positions, O out features, I in features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from forgetscale.data import TokenSet, calibration_rows, open_stream
from forgetscale.evaluation.forced import ForcedRecall, pad_right
from forgetscale.evaluation.loading import load_tasks
from forgetscale.evaluation.prompts import ChatPrompts
from forgetscale.ops.schedule import learning_rate

BATCH_SIZE = 16
NUM_BLOCKS = 500
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Project = Callable[[Tensor, str], Tensor]
"""``(input, parameter name) -> input times the transposed parameter``."""


@dataclass(frozen=True, slots=True)
class Adaptation:
    """How a run adapts the model."""

    lr: float
    num_steps: int
    every_steps: int = 40


class _HalfProduct(torch.autograd.Function):
    """``x W^T`` with bf16 operands and fp32 results, in both directions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        flat, half = x.reshape(-1, x.shape[-1]).bfloat16(), weight.bfloat16()
        ctx.save_for_backward(flat, half)
        ctx.shape = x.shape
        return (flat @ half.t()).float().view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        flat, half = ctx.saved_tensors
        grad = grads[0].reshape(-1, grads[0].shape[-1]).bfloat16()
        return (grad @ half).float().view(ctx.shape), (grad.t() @ flat).float()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


class World:
    """A prepared world below ``seed-N`` of a quickstart folder.

    Args:
        folder: ``OUTPUT/seed-N``, with the source model, token sets and tasks.
    """

    def __init__(self, folder: Path) -> None:
        self.seed = int(folder.name.partition("-")[2])
        path = folder / "source" / "export"
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        self.config = model.config
        self.weights: dict[str, nn.Parameter] = dict(model.named_parameters())
        self.target = TokenSet(folder / "tokens" / "target")
        self.calibration = TokenSet(folder / "tokens" / "calibration")
        tokenizer: Any = AutoTokenizer.from_pretrained(path)
        names = ("perplexity/source", "perplexity/target", "recall")
        source, target, recall = load_tasks(names, folder / "tasks", tokenizer=tokenizer)
        self._texts = {"source": source.rows, "target": target.rows}  # type: ignore[union-attr]
        self._recall = ForcedRecall(recall, ChatPrompts(tokenizer))  # type: ignore[arg-type]
        self._flatten()
        self._check_architecture(model)

    def _flatten(self) -> None:
        """Lay all parameters and gradients out in one tensor each, and keep the source values."""
        size = sum(param.numel() for param in self.weights.values())
        self.flat = nn.Parameter(torch.empty(size))
        self.flat.grad = torch.zeros(size)
        self.spans: dict[str, slice] = {}
        first = 0
        for name, param in self.weights.items():
            span = self.spans[name] = slice(first, first + param.numel())
            self.flat.data[span] = param.data.flatten()
            param.data = self.flat.data[span].view_as(param)
            param.grad = self.flat.grad[span].view_as(param)
            first += param.numel()
        self.source = self.flat.data.clone()

    @torch.no_grad()
    def _check_architecture(self, model: Any) -> None:
        """Refuse a model that the forward pass below does not compute."""
        config = self.config
        width = config.hidden_size // config.num_attention_heads
        theta = config.rope_parameters["rope_theta"]
        rates = theta ** (-torch.arange(0, width, 2).float() / width)
        angles = torch.outer(torch.arange(config.max_position_embeddings).float(), rates)
        self._cos, self._sin = (
            torch.cat((angles, angles), -1).cos(),
            torch.cat((angles,) * 2, -1).sin(),
        )
        ids = self.target.read(range(2))
        ours = self.project(self.hidden(ids, self.project), HEAD)
        if not torch.allclose(ours, model(input_ids=ids).logits, atol=1e-4):
            raise ValueError("rule_world computes OLMo 2 without grouped attention only")

    @property
    def matrices(self) -> list[str]:
        """Names of the body's matrices."""
        return [n for n, w in self.weights.items() if w.dim() == 2 and n not in (EMBEDDING, HEAD)]

    @property
    def vectors(self) -> list[str]:
        """Names of the gains of norms."""
        return [name for name, weight in self.weights.items() if weight.dim() == 1]

    # ---- forward passes -------------------------------------------------------------------

    def project(self, x: Tensor, name: str) -> Tensor:
        """Multiply by a parameter in fp32."""
        return F.linear(x, self.weights[name])

    def half_project(self, x: Tensor, name: str) -> Tensor:
        """Multiply by a parameter in bf16."""
        result: Tensor = _HalfProduct.apply(x, self.weights[name])  # type: ignore[no-untyped-call]
        return result

    def hidden(
        self, ids: Tensor, project: Project, look: Callable[[Tensor, str], None] | None = None
    ) -> Tensor:
        """Return the last hidden states ``[B, T, D]``; ``look`` sees the inputs of norms."""
        size, length = ids.shape
        heads, depth = self.config.num_attention_heads, self.config.hidden_size
        cos, sin = self._cos[:length], self._sin[:length]

        def norm(x: Tensor, name: str) -> Tensor:
            if look is not None:
                look(x, name)
            return F.rms_norm(x, x.shape[-1:], self.weights[name], self.config.rms_norm_eps)

        def split(x: Tensor) -> Tensor:
            return x.view(size, length, heads, depth // heads).transpose(1, 2)

        x = F.embedding(ids, self.weights[EMBEDDING])
        for layer in range(self.config.num_hidden_layers):
            at = f"model.layers.{layer}.self_attn."
            q = split(norm(project(x, at + "q_proj.weight"), at + "q_norm.weight"))
            k = split(norm(project(x, at + "k_proj.weight"), at + "k_norm.weight"))
            v = split(project(x, at + "v_proj.weight"))
            q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            mixed = mixed.transpose(1, 2).reshape(size, length, depth)
            at, up = f"model.layers.{layer}.", f"model.layers.{layer}.mlp."
            mixed = project(mixed, at + "self_attn.o_proj.weight")
            x = x + norm(mixed, at + "post_attention_layernorm.weight")
            inner = F.silu(project(x, up + "gate_proj.weight")) * project(x, up + "up_proj.weight")
            inner = project(inner, up + "down_proj.weight")
            x = x + norm(inner, at + "post_feedforward_layernorm.weight")
        return norm(x, "model.norm.weight")

    def loss(self, ids: Tensor, project: Project, reduction: str = "mean", **more: Any) -> Tensor:
        """Return the next-token loss of rows in nats."""
        hidden = self.hidden(ids, project, **more)[:, :-1].flatten(0, 1)
        return F.cross_entropy(project(hidden, HEAD), ids[:, 1:].flatten(), reduction=reduction)

    # ---- measuring ------------------------------------------------------------------------

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Return perplexities and forced-match recall as ``forgetscale.evaluation`` does."""
        found = {}
        for name, rows in self._texts.items():
            parts = [self.loss(part, self.project, "sum").double() for part in rows.split(64)]
            found[name] = math.exp(float(sum(parts)) / (len(rows) * (rows.shape[1] - 1)))
        return found | {"recall": self._measure_recall()}

    def _measure_recall(self) -> float:
        forced = self._recall
        asked = sorted(forced._rows, key=lambda row: len(row.ids))
        right: dict[int, bool] = {}
        for first in range(0, len(asked), 64):
            rows = asked[first : first + 64]
            ids, _ = pad_right([row.ids for row in rows], forced._pad_id)
            hidden = self.hidden(ids, self.project)
            for index, row in enumerate(rows):
                answer = hidden[index, row.start - 1 : len(row.ids) - 1]
                hits = self.project(answer, HEAD).argmax(-1) == ids[index, row.start : len(row.ids)]
                right[row.question] = right.get(row.question, False) or bool(hits.all())
        return sum(right.values()) / len(right)

    # ---- statistics -----------------------------------------------------------------------

    def rows(self, side: str) -> Tensor:
        """Return the rows statistics are taken from: ``source`` chats or ``target`` text."""
        if side == "source":
            return self.calibration.read(calibration_rows(self.calibration.num_rows, NUM_BLOCKS))
        order = np.random.default_rng(0).permutation(self.target.num_rows)
        return self.target.read(order[:NUM_BLOCKS])

    @torch.no_grad()
    def input_norms(self, side: str) -> dict[str, Tensor]:
        """Return the root mean square of every input feature of matrices and norms, fp64."""
        sums: dict[str, Tensor] = {}

        def look(x: Tensor, name: str) -> None:
            squares = x.double().flatten(0, -2).square().sum(0)
            sums[name] = sums.get(name, torch.zeros_like(squares)) + squares

        def project(x: Tensor, name: str) -> Tensor:
            look(x, name)
            return self.project(x, name)

        rows = self.rows(side)
        for part in rows.split(4):
            self.hidden(part, project, look)
        return {name: (total / rows.numel()).sqrt() for name, total in sums.items()}

    def squared_gradients(self, side: str) -> dict[str, Tensor]:
        """Return ``sum over rows of (dL_row / dW)^2`` of every matrix, ``[O, I]``; L summed."""
        sums: dict[str, Tensor] = {}

        def project(x: Tensor, name: str) -> Tensor:
            output = self.project(x, name)
            if name != HEAD:
                output.register_hook(lambda grad: add(x.detach(), grad, name))
            return output

        def add(x: Tensor, grad: Tensor, name: str) -> None:
            found = torch.einsum("bto,bti->boi", grad, x).square().sum(0).double()
            sums[name] = sums.get(name, torch.zeros_like(found)) + found

        for part in self.rows(side).split(4):
            self.loss(part, project, "sum").backward()
        assert self.flat.grad is not None
        self.flat.grad.zero_()
        return sums

    # ---- training -------------------------------------------------------------------------

    def adapt(self, frozen: Mapping[str, Tensor], how: Adaptation) -> list[dict[str, float]]:
        """Adapt the source model to the target text; return the curve.

        Args:
            frozen: Parameter name -> bool mask of its shape, True where nothing may move.
            how: Rate and steps.
        """
        grad = self.flat.grad
        assert grad is not None
        self.flat.data.copy_(self.source)
        keep = torch.ones_like(self.source)
        for name, mask in frozen.items():
            keep[self.spans[name]] = (~mask).flatten().float()
        decayed = keep.clone()
        for name in self.vectors:
            decayed[self.spans[name]] = 0
        optimizer = torch.optim.AdamW([self.flat], lr=0.0, weight_decay=0.0, fused=True)
        stream = open_stream(self.target, seed=self.seed, global_batch_size=BATCH_SIZE)
        curve = [{"step": 0, **self.measure()}]
        for step in range(1, how.num_steps + 1):
            grad.zero_()
            self.loss(next(stream).input_ids, self.half_project).backward()
            grad.mul_(keep)
            rate = learning_rate(
                step,
                num_steps=how.num_steps,
                peak=how.lr,
                schedule="cosine",
                warmup_fraction=0.05,
            )
            self.flat.data.sub_(self.flat.data * decayed, alpha=rate * 0.01)
            if (norm := float(grad.norm())) > 1.0:
                grad.mul_(1.0 / (norm + 1e-6))
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
            if step % how.every_steps == 0 or step == how.num_steps:
                curve.append({"step": step, **self.measure()})
        self.flat.data.copy_(self.source)
        return curve

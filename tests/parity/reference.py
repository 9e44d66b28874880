"""Dense reference of SSU training, written from the papers; imports nothing of the project.

One process, one type (fp64 unless told otherwise), whole matrices, full-size boolean masks. OLMo 2:
arXiv:2501.00656 (norms after attention and feed-forward, norms of queries and keys). SSU:
arXiv:2512.04844. AdamW: arXiv:1711.05101, decoupled decay.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor


class DenseOlmo2:
    """Forward pass over a dictionary of weights."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float64) -> None:
        self.config = json.loads((folder / "config.json").read_text())
        stored = safetensors.torch.load_file(folder / "model.safetensors")
        self.weights = {name: value.to(dtype) for name, value in stored.items()}
        self.inputs: dict[str, Tensor] = {}

    def _norm(self, name: str, x: Tensor) -> Tensor:
        self.inputs[name] = x.detach()
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.config["rms_norm_eps"])
        return x * scale * self.weights[name + ".weight"]

    def _linear(self, name: str, x: Tensor) -> Tensor:
        self.inputs[name] = x.detach()
        return x @ self.weights[name + ".weight"].T

    def _rotate(self, x: Tensor) -> Tensor:
        length, size = x.shape[-2:]
        rope = self.config.get("rope_parameters") or {}
        theta = self.config.get("rope_theta", rope.get("rope_theta"))
        frequency = theta ** (-torch.arange(0, size, 2, dtype=x.dtype) / size)
        angle = torch.arange(length, dtype=x.dtype)[:, None] * frequency
        cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)
        half = torch.cat([-x[..., size // 2 :], x[..., : size // 2]], -1)
        return x * cos + half * sin

    def _attention(self, name: str, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        heads, groups = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        size = self.config["head_dim"]
        q = self._norm(f"{name}.q_norm", self._linear(f"{name}.q_proj", x))
        k = self._norm(f"{name}.k_norm", self._linear(f"{name}.k_proj", x))
        v = self._linear(f"{name}.v_proj", x)
        q = self._rotate(q.view(batch, length, heads, size).transpose(1, 2))
        k = self._rotate(k.view(batch, length, groups, size).transpose(1, 2))
        v = v.view(batch, length, groups, size).transpose(1, 2)
        k, v = (t.repeat_interleave(heads // groups, 1) for t in (k, v))
        scores = q @ k.transpose(-1, -2) / math.sqrt(size)
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        mixed = scores.masked_fill(future, -math.inf).softmax(-1) @ v
        return self._linear(
            f"{name}.o_proj", mixed.transpose(1, 2).reshape(batch, length, heads * size)
        )

    def logits(self, ids: Tensor) -> Tensor:
        """Return logits ``[rows, positions, vocab]``."""
        x = self.weights["model.embed_tokens.weight"][ids]
        for layer in range(self.config["num_hidden_layers"]):
            name = f"model.layers.{layer}"
            mixed = self._attention(f"{name}.self_attn", x)
            x = x + self._norm(f"{name}.post_attention_layernorm", mixed)
            gate = torch.nn.functional.silu(self._linear(f"{name}.mlp.gate_proj", x))
            up = self._linear(f"{name}.mlp.up_proj", x)
            down = self._linear(f"{name}.mlp.down_proj", gate * up)
            x = x + self._norm(f"{name}.post_feedforward_layernorm", down)
        x = self._norm("model.norm", x)
        head = self.weights.get("lm_head.weight", self.weights["model.embed_tokens.weight"])
        return x @ head.T


def mean_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Return the mean negative log-likelihood of every next token of the rows."""
    log_probs = logits[:, :-1].log_softmax(-1)
    return -log_probs.gather(-1, ids[:, 1:, None]).mean()


def ssu_plan(folder: Path, rows: Tensor, score: str, fraction: float) -> dict[str, list[int]]:
    """Return the frozen columns of every body parameter, by the paper's or the code's rule."""
    model = DenseOlmo2(folder)
    squares: dict[str, Tensor] = {}
    with torch.no_grad():
        for row in rows:
            model.logits(row[None])
            for name, x in model.inputs.items():
                total = x.pow(2).sum((0, 1))
                squares[name] = squares.get(name, torch.zeros_like(total)) + total
    plan = {}
    for name, weight in model.weights.items():
        module = name.removesuffix(".weight")
        if module not in squares and module != "model.norm":
            continue
        square = squares[module]
        mean = square / rows.numel()
        matrix = weight if weight.dim() == 2 else weight[None]
        if score == "paper":
            values = matrix.abs().sum(0) * square.sqrt()
        elif score == "official" and weight.dim() == 2:
            values = matrix.pow(2).sum(0).sqrt() * mean
        elif score == "official":
            values = matrix[0].abs() * (1 + mean)
        else:
            power = {"mag_l1": 1, "mag_l2": 2}[score]
            values = matrix.abs().pow(power).sum(0).pow(1 / power)
        count = int(fraction * len(values) + 1e-9)
        ranked = sorted(range(len(values)), key=lambda j: (-float(values[j].float()), j))
        plan[name] = sorted(ranked[:count])
    return plan


def fisher_scores(folder: Path, rows: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
    """Return ``sum_i F_ij`` with whole fp64 gradients, one row at a time.

    ``labels``: targets of positions 1.. of every row; the row itself where None.
    """
    model = DenseOlmo2(folder)
    names = [name for name in model.weights if "embed_tokens" not in name and "lm_head" not in name]
    fisher = {name: torch.zeros_like(model.weights[name]) for name in names}
    for name in names:
        model.weights[name].requires_grad_()
    for number, row in enumerate(rows):
        ids = row if labels is None else torch.cat([row[:1], labels[number]])
        loss = mean_loss(model.logits(row[None]), ids[None])
        grads = torch.autograd.grad(loss, [model.weights[name] for name in names])
        for name, grad in zip(names, grads, strict=True):
            fisher[name] += grad**2 / len(rows)
    return {name: value.reshape(-1, value.shape[-1]).sum(0) for name, value in fisher.items()}


def sgpt_scores(folder: Path, rows: Tensor, published: bool) -> dict[str, Tensor]:
    """Return SparseGPT's saliency summed per column, or the published average of squares alone.

    Saliency as in its paper and code: damp, invert, factorise the inverse from the left.
    """
    model = DenseOlmo2(folder)
    hessians: dict[str, Tensor] = {}
    recent: dict[str, Tensor] = {}
    with torch.no_grad():
        for row in rows:
            model.logits(row[None])
            for name, x in model.inputs.items():
                x = x[0]
                hessians[name] = hessians.get(name, 0) + x.T @ x
                new = x.pow(2).mean(0)
                recent[name] = (recent[name] + new) / 2 if name in recent else new
    found = {}
    for name, weight in model.weights.items():
        module = name.removesuffix(".weight")
        if module not in hessians:
            continue
        if published:
            average = recent[module]
            found[name] = average if weight.dim() == 2 else weight.abs() * (1 + average)
            continue
        hessian = hessians[module] if weight.dim() == 2 else hessians[module].diag().diag()
        damped = hessian + 0.01 * hessian.diag().mean() * torch.eye(len(hessian)).to(hessian)
        factor = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
        matrix = weight if weight.dim() == 2 else weight[None]
        found[name] = (matrix**2 / factor.diag() ** 2).sum(0)
    return found


@dataclass
class Settings:
    """Training settings, as in the recipe."""

    num_steps: int
    lr: float
    weight_decay: float
    max_grad_norm: float
    warmup_steps: int
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8


def rate(step: int, settings: Settings) -> float:
    """Return the rate of a step counted from 0: linear warmup, then cosine to 0."""
    if step < settings.warmup_steps:
        return settings.lr * step / settings.warmup_steps
    done = (step - settings.warmup_steps) / (settings.num_steps - settings.warmup_steps)
    return settings.lr * (1 + math.cos(math.pi * done)) / 2


def masks(
    weights: dict[str, Tensor], columns: dict[str, list[int]], rows: dict[str, list[int]]
) -> dict[str, Tensor]:
    """Return full-size masks: True where a weight may change."""
    found = {name: torch.ones_like(value, dtype=torch.bool) for name, value in weights.items()}
    for name, index in columns.items():
        found[name][..., index] = False
    for name, index in rows.items():
        found[name][index] = False
    return found


class AdamW:
    """AdamW on whole tensors; frozen entries have no gradient, no decay, no moments."""

    def __init__(
        self, masters: dict[str, Tensor], allowed: dict[str, Tensor], settings: Settings
    ) -> None:
        self._masters, self._allowed, self._settings = masters, allowed, settings
        self._first = {name: torch.zeros_like(value) for name, value in masters.items()}
        self._second = {name: torch.zeros_like(value) for name, value in masters.items()}

    def step(self, number: int, grads: dict[str, Tensor]) -> float:
        """Update in place with step ``number`` (from 0); return the norm over trainable entries."""
        s = self._settings
        grads = {name: grad * self._allowed[name] for name, grad in grads.items()}
        norm = math.sqrt(sum(float(grad.double().pow(2).sum()) for grad in grads.values()))
        scale = min(1.0, s.max_grad_norm / (norm + 1e-6))
        lr = rate(number, s)
        for name, weight in self._masters.items():
            grad = grads[name] * scale
            self._first[name].lerp_(grad, 1 - s.betas[0])
            self._second[name].lerp_(grad * grad, 1 - s.betas[1])
            first = self._first[name] / (1 - s.betas[0] ** (number + 1))
            second = self._second[name] / (1 - s.betas[1] ** (number + 1))
            decay = lr * s.weight_decay if weight.dim() == 2 else 0.0
            new = weight * (1 - decay) - lr * first / (second.sqrt() + s.eps)
            weight.copy_(torch.where(self._allowed[name], new, weight))
        return norm


@dataclass
class Trained:
    """What the reference found."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]


def train(
    folder: Path,
    batches: list[Tensor],
    settings: Settings,
    columns: dict[str, list[int]],
    rows: dict[str, list[int]],
    dtype: torch.dtype = torch.float64,
    loss_of: Callable[[Tensor, Tensor], Tensor] = mean_loss,
) -> Trained:
    """Train on given global batches ``[rows, positions]``."""
    model = DenseOlmo2(folder, dtype)
    for value in model.weights.values():
        value.requires_grad_()
    optimizer = AdamW(
        {name: value.detach() for name, value in model.weights.items()},
        masks(model.weights, columns, rows),
        settings,
    )
    losses, norms = [], []
    for number, ids in enumerate(batches):
        loss = loss_of(model.logits(ids), ids)
        grads = torch.autograd.grad(loss, list(model.weights.values()))
        losses.append(float(loss.detach()))
        norms.append(optimizer.step(number, dict(zip(model.weights, grads, strict=True))))
    return Trained(losses, norms, {name: w.detach() for name, w in model.weights.items()})

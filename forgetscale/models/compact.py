"""Layers whose weight is cut into a frozen and a trainable part.

Forward assembles the weight and multiplies once; backward assembles it again, computes the weight
gradient of the trainable part only, and needs the input features of that part alone. Nothing
assembled is kept, so under ZeRO-3 both parts are gathered for backward as any parameter is.

Shape letters: N flattened positions, O out features, I in features, P trainable columns or rows,
U input columns that the layers of one group need for backward.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from forgetscale.errors import ConfigError
from forgetscale.masks import FreezePlan
from forgetscale.masks.compact import CompactLayout, Piece, compact_layout

SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers of one parent that usually read the same tensor; checked at run time, see below."""


class SharedInput:
    """The input columns that layers reading the same tensor keep for backward, once for all.

    Frozen sets of such layers overlap, since they share the activations they are scored by: the
    union of their trainable columns is kept instead of one copy per layer. Whether two layers
    really got the same tensor is decided on each call, so a wrong group costs nothing but memory.

    Args:
        indices: Trainable columns of each layer of the group.
    """

    def __init__(self, indices: Sequence[Int64[Tensor, " P"]]) -> None:
        self.union: Tensor = torch.unique(torch.cat(list(indices)))
        self._members = len(indices)
        self._seen: Tensor | None = None
        self._version = 0
        self._kept: Tensor | None = None
        self._uses = 0

    def keep(self, x: Float[Tensor, "N I"]) -> Float[Tensor, "N U"]:
        """Return the kept columns of ``x``, gathered once while the same values come in.

        ZeRO-3 hands every layer a tensor object of its own, so storage and version are compared;
        the storage cannot be reused while it is held here.
        """
        if self._kept is None or not self._is_seen(x):
            self._seen, self._version, self._uses = x.detach(), x._version, 0
            self.union = self.union.to(x.device)
            self._kept = x.detach().index_select(1, self.union)
        kept = self._kept
        self._uses += 1
        if self._uses == self._members:
            self._seen = self._kept = None
        return kept

    def _is_seen(self, x: Tensor) -> bool:
        seen = self._seen
        return (
            seen is not None
            and seen.untyped_storage()._cdata == x.untyped_storage()._cdata
            and seen.storage_offset() == x.storage_offset()
            and seen.shape == x.shape
            and seen.stride() == x.stride()
            and self._version == x._version
        )


class CompactLinear(nn.Module):
    """A linear layer whose weight is cut by columns or by rows.

    Args:
        frozen: The part that never moves.
        trainable: The part that is trained.
        bias: Whether the layer has a bias; it is an ordinary parameter.
    """

    frozen_index: Tensor
    trainable_index: Tensor

    def __init__(self, frozen: Piece, trainable: Piece, bias: bool) -> None:
        super().__init__()
        self.out_features, self.in_features = trainable.shape
        self.axis = trainable.axis
        self.frozen = nn.Parameter(torch.empty(frozen.stored_shape), requires_grad=False)
        self.trainable = nn.Parameter(torch.empty(trainable.stored_shape))
        self.bias = nn.Parameter(torch.empty(self.out_features)) if bias else None
        self.register_buffer("frozen_index", frozen.index, persistent=False)
        self.register_buffer("trainable_index", trainable.index, persistent=False)
        self.shared: SharedInput | None = None
        self._local: Tensor | None = None

    def share_input(self, group: SharedInput) -> None:
        """Keep input columns together with other layers that read the same tensor."""
        self.shared = group
        self._local = torch.searchsorted(group.union, self.trainable_index.cpu())

    def extra_repr(self) -> str:
        """Describe the layer as ``nn.Linear`` does."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, axis={self.axis},"
            f" trainable={self.trainable_index.numel()}, bias={self.bias is not None}"
        )

    def assemble(self) -> Float[Tensor, "O I"]:
        """Return the whole weight (a view of ``[I, O]`` storage when cut by columns)."""
        by_column = self.axis == "column"
        shape = (self.out_features, self.in_features)
        whole = self.frozen.new_empty(shape[::-1] if by_column else shape)
        whole.index_copy_(0, self.frozen_index, self.frozen.detach())
        whole.index_copy_(0, self.trainable_index, self.trainable.detach())
        return whole.t() if by_column else whole

    def forward(self, x: Float[Tensor, "... I"]) -> Float[Tensor, "... O"]:
        """Multiply as ``nn.Linear`` does."""
        flat = x.reshape(-1, self.in_features)
        if not torch.is_grad_enabled():
            y = _product(flat, self.assemble(), self.bias)
        else:
            y = _CompactProduct.apply(  # type: ignore[no-untyped-call]
                flat, self.trainable, self.bias, self._kept(flat), self
            )
        return y.view(*x.shape[:-1], self.out_features)

    def _kept(self, flat: Tensor) -> Tensor:
        if self.axis == "row":
            return flat.detach()
        if self.shared is not None:
            return self.shared.keep(flat)
        return flat.detach().index_select(1, self.trainable_index)

    def _weight_grad(self, kept: Tensor, grad: Float[Tensor, "N O"]) -> Float[Tensor, "P other"]:
        if self.axis == "row":
            return grad.index_select(1, self.trainable_index).t() @ kept
        if self._local is not None:
            self._local = self._local.to(kept.device)
            kept = kept.index_select(1, self._local)
        return kept.t() @ grad


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x @ weight.t() if bias is None else torch.addmm(bias, x, weight.t())


class _CompactProduct(torch.autograd.Function):
    """``x W^T + b`` with the weight gradient of the trainable part only."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        trainable: Tensor,
        bias: Tensor | None,
        kept: Tensor,
        layer: CompactLinear,
    ) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(kept)
        return _product(x, layer.assemble(), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        layer: CompactLinear = ctx.layer
        (kept,) = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        x_grad = grad @ layer.assemble() if wants_x else None
        weight_grad = layer._weight_grad(kept, grad) if wants_weight else None
        bias_grad = grad.sum(0) if wants_bias else None
        return x_grad, weight_grad, bias_grad, None, None


class CompactEmbedding(nn.Module):
    """A token embedding cut by rows.

    Args:
        frozen: Rows that never move.
        trainable: Rows that are trained.
        padding_idx: Row without gradient, as in ``nn.Embedding``; None for none.
    """

    slot: Tensor

    def __init__(self, frozen: Piece, trainable: Piece, padding_idx: int | None) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = trainable.shape
        self.padding_idx = padding_idx
        self.frozen = nn.Parameter(torch.empty(frozen.stored_shape), requires_grad=False)
        self.trainable = nn.Parameter(torch.empty(trainable.stored_shape))
        # Token id -> row of ``trainable`` (>= 0), or ``-1 - row`` of ``frozen``.
        slot = torch.empty(self.num_embeddings, dtype=torch.int64)
        slot[trainable.index] = torch.arange(trainable.index.numel())
        slot[frozen.index] = -1 - torch.arange(frozen.index.numel())
        self.register_buffer("slot", slot, persistent=False)
        padding = -1 if padding_idx is None else int(slot[padding_idx])
        self._padding_row = padding if padding >= 0 else None

    def forward(self, input_ids: Int64[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        """Look the ids up."""
        slot = self.slot[input_ids]
        moving = nn.functional.embedding(slot.clamp_min(0), self.trainable, self._padding_row)
        fixed = nn.functional.embedding((-1 - slot).clamp_min(0), self.frozen)
        return torch.where((slot >= 0)[..., None], moving, fixed)


def layout_for(plan: FreezePlan, structure: Any) -> CompactLayout:
    """Return how a plan is stored in a model: which matrices are cut, which keep a mask.

    Args:
        plan: Freeze plan in names of the source model.
        structure: The model, or its skeleton on the meta device.
    """
    shapes = {name: tuple(param.shape) for name, param in structure.named_parameters()}
    linear = [f"{n}.weight" for n, m in structure.named_modules() if type(m) is nn.Linear]
    tables = [f"{n}.weight" for n, m in structure.named_modules() if type(m) is nn.Embedding]
    head = next(n for n, m in structure.named_modules() if m is structure.get_output_embeddings())
    by_column = [name for name in linear if name in shapes and name != f"{head}.weight"]
    by_row = [name for name in [*tables, *linear] if name in shapes]
    return compact_layout(plan, shapes, by_column, by_row)


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)


def make_compact(model: Any, layout: CompactLayout) -> None:
    """Replace the layers that a layout cuts, in place; weights are left unset.

    Under ``zero.Init`` the new parameters are partitioned as they are made.

    Args:
        model: Hugging Face causal language model.
        layout: From ``layout_for``.

    Raises:
        ConfigError: A matrix to cut belongs to a layer that cannot be.
    """
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    head = next(n for n, m in model.named_modules() if m is model.get_output_embeddings())
    made: dict[str, CompactLinear] = {}
    for matrix, (frozen, trainable) in layout.matrices().items():
        name = matrix.removesuffix(".weight")
        old = model.get_submodule(name)
        parts = layout.pieces[frozen], layout.pieces[trainable]
        if isinstance(old, nn.Linear):
            made[name] = CompactLinear(*parts, bias=old.bias is not None)
            _replace(model, name, made[name])
        elif isinstance(old, nn.Embedding):
            table = CompactEmbedding(*parts, padding_idx=old.padding_idx)
            _replace(model, name, table)
            if tied:
                top = CompactLinear(*parts, bias=False)
                top.frozen, top.trainable = table.frozen, table.trainable
                _replace(model, head, top)
        else:
            raise ConfigError(
                f"layout compact: {matrix} belongs to a {type(old).__name__}, which cannot be cut;"
                " set method.layout to masked."
            )
    _share_inputs(made)


def _share_inputs(made: Mapping[str, CompactLinear]) -> None:
    parents = dict.fromkeys(name.rpartition(".")[0] for name in made)
    for parent in parents:
        for leaves in SHARED_INPUTS:
            names = [f"{parent}.{leaf}".removeprefix(".") for leaf in leaves]
            group = _same_width([made[name] for name in names if name in made])
            if len(group) > 1:
                shared = SharedInput([layer.trainable_index.cpu() for layer in group])
                for layer in group:
                    layer.share_input(shared)


def _same_width(layers: Iterable[CompactLinear]) -> list[CompactLinear]:
    found = [layer for layer in layers if layer.axis == "column"]
    return [layer for layer in found if layer.in_features == found[0].in_features]

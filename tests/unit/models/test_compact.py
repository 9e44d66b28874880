"""Cut layers compute what whole layers compute, and keep less for backward."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM

from forgetscale.masks import FreezePlan
from forgetscale.models import CausalLMWithLoss, layout_for, make_compact
from forgetscale.models.compact import CompactEmbedding, CompactLinear
from forgetscale.ops.losses import cross_entropy
from tests.distributed import tiny

OUT, IN = 6, 9
FROZEN = {"column": [0, 3, 4, 8], "row": [1, 2, 5]}


def close(found: Tensor, expected: Tensor) -> None:
    """Equal up to the order of sums; columns are multiplied from transposed storage."""
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


class Holder(nn.Module):
    """The part of a Hugging Face model that ``make_compact`` looks at."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(IN, IN)
        self.q_proj = nn.Linear(IN, OUT, bias=bias)
        self.k_proj = nn.Linear(IN, OUT, bias=bias)
        self.head = nn.Linear(IN, IN, bias=False)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def fill(model: nn.Module, source: nn.Module, layout) -> None:
    weights = dict(source.named_parameters())
    with torch.no_grad():
        for name, param in model.named_parameters():
            piece = layout.pieces.get(name)
            param.copy_(weights[name] if piece is None else piece.take(weights[piece.matrix]))


def make_pair(bias: bool, plan: FreezePlan) -> tuple[Holder, Holder, object]:
    torch.manual_seed(0)
    source = Holder(bias).double()
    layout = layout_for(plan, source)
    cut = copy.deepcopy(source)
    make_compact(cut, layout)
    cut.double()
    fill(cut, source, layout)
    return source, cut, layout


@pytest.mark.parametrize("axis", ["column", "row"])
@pytest.mark.parametrize("bias", [False, True])
def test_a_cut_layer_equals_the_whole_one(axis: str, bias: bool):
    frozen = torch.tensor(FROZEN[axis])
    source, cut, layout = make_pair(bias, FreezePlan(**{f"{axis}s": {"q_proj.weight": frozen}}))
    assert isinstance(cut.q_proj, CompactLinear) and isinstance(cut.k_proj, nn.Linear)
    x = torch.randn(2, 5, IN, dtype=torch.float64)
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    outs = [model.q_proj(value) for model, value in zip((source, cut), inputs, strict=True)]
    close(outs[1], outs[0])
    with torch.no_grad():
        assert torch.equal(cut.q_proj(x), outs[1])
    seed = torch.randn_like(outs[0])
    for out in outs:
        out.backward(seed)
    close(inputs[1].grad, inputs[0].grad)
    piece = layout.pieces["q_proj.trainable"]
    expected = piece.take(source.q_proj.weight.grad)
    close(cut.q_proj.trainable.grad, expected)
    assert cut.q_proj.frozen.grad is None and not cut.q_proj.frozen.requires_grad
    if bias:
        close(cut.q_proj.bias.grad, source.q_proj.bias.grad)


def saved_bytes(run) -> int:
    """Return bytes of distinct tensors kept for backward, parameters excluded."""
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            found[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(found.values())


def test_only_trainable_input_columns_are_kept_and_once_for_a_group():
    columns = {"q_proj.weight": torch.tensor([0, 1, 2, 3, 4]), "k_proj.weight": torch.arange(1, 6)}
    _, cut, _ = make_pair(False, FreezePlan(columns=columns))
    x = torch.randn(10, IN, dtype=torch.float64, requires_grad=True)
    union = {5, 6, 7, 8} | {0, 6, 7, 8}
    assert cut.q_proj.shared is cut.k_proj.shared is not None
    assert saved_bytes(lambda: (cut.q_proj(x), cut.k_proj(x))) == 10 * len(union) * 8
    # Alone, or on different inputs, each layer keeps its own.
    other = x.detach().clone().requires_grad_()
    assert saved_bytes(lambda: (cut.q_proj(x), cut.k_proj(other))) == 2 * 10 * len(union) * 8


def test_layers_of_a_group_on_the_same_or_on_other_inputs_have_right_gradients():
    columns = {"q_proj.weight": torch.tensor([0, 1, 2]), "k_proj.weight": torch.tensor([2, 7, 8])}
    source, cut, layout = make_pair(False, FreezePlan(columns=columns))
    x = torch.randn(4, IN, dtype=torch.float64)
    for same in (True, False):
        for model in (source, cut):
            model.zero_grad()
            value = x.clone().requires_grad_()
            first = model.q_proj(value)
            second = model.k_proj(value if same else 2 * value)
            (first.sin().sum() + second.cos().sum()).backward()
        for name in ("q_proj", "k_proj"):
            piece = layout.pieces[f"{name}.trainable"]
            expected = piece.take(source.get_submodule(name).weight.grad)
            found = cut.get_submodule(name).trainable.grad
            close(found, expected)


def test_an_input_changed_in_place_between_layers_is_noticed():
    columns = {"q_proj.weight": torch.tensor([0]), "k_proj.weight": torch.tensor([0])}
    _, cut, layout = make_pair(False, FreezePlan(columns=columns))
    x = torch.ones(3, IN, dtype=torch.float64)
    cut.q_proj(x)
    x.mul_(2)
    cut.k_proj(x).sum().backward()
    assert torch.equal(cut.k_proj.trainable.grad, torch.full((IN - 1, OUT), 6.0).double())


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool):
    columns = {"q_proj.weight": torch.tensor([0, 5]), "k_proj.weight": torch.tensor([1, 2])}
    _, cut, _ = make_pair(True, FreezePlan(columns=columns))
    x = torch.randn(4, IN, dtype=torch.float64, requires_grad=True)

    def block(value: Tensor) -> Tensor:
        return cut.q_proj(value).sin() * cut.k_proj(value)

    grads = []
    for run in (block, lambda value: checkpoint(block, value, use_reentrant=reentrant)):
        cut.zero_grad()
        x.grad = None
        run(x).sum().backward()
        trained = [p.grad.clone() for p in cut.parameters() if p.grad is not None]
        grads.append([x.grad.clone(), *trained])
    assert len(grads[0]) == 5
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("padding", [None, 2, 3])
def test_a_cut_embedding_equals_the_whole_one(padding: int | None):
    torch.manual_seed(1)
    source = nn.Embedding(8, 3, padding_idx=padding).double()
    holder = Holder(False)
    holder.embed = source
    layout = layout_for(FreezePlan(rows={"embed.weight": torch.tensor([0, 3, 7])}), holder)
    cut = copy.deepcopy(holder)
    make_compact(cut, layout)
    assert isinstance(cut.embed, CompactEmbedding)
    cut.double()
    fill(cut, holder, layout)
    ids = torch.tensor([[0, 1, 2, 3], [7, 7, 2, 1]])
    for table in (source, cut.embed):
        table(ids).square().sum().backward()
    assert torch.equal(cut.embed(ids), source(ids))
    expected = layout.pieces["embed.trainable"].take(source.weight.grad)
    assert torch.equal(cut.embed.trainable.grad, expected)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", [tiny.olmo2, tiny.llama, tiny.qwen2])
def test_whole_models(tmp_path, architecture, tied: bool):
    folder = tiny.make_model(tmp_path, architecture=architecture, tied=tied)
    model = AutoModelForCausalLM.from_pretrained(folder).double()
    columns, rows = {}, {}
    generator = torch.Generator().manual_seed(2)
    for name, param in model.named_parameters():
        axis = 0 if "embed" in name or "lm_head" in name else 1
        if param.dim() == 2:
            order = torch.randperm(param.shape[axis], generator=generator)
            (columns if axis else rows)[name] = order[: order.numel() // 2].sort().values
    plan = FreezePlan(columns=columns, rows=rows)
    layout = layout_for(plan, model)
    cut = copy.deepcopy(model)
    make_compact(cut, layout)
    cut.double()
    fill(cut, model, layout)
    ids = torch.randint(3, tiny.VOCAB_SIZE, (2, 12), generator=generator)
    losses = []
    wrapped = [CausalLMWithLoss(m, chunk_size=5) for m in (model, cut)]
    for module in wrapped:
        loss = module(ids, ids, cross_entropy)
        loss.backward()
        losses.append(loss.detach())
    close(losses[1], losses[0])
    expected = dict(model.named_parameters())
    trained = 0
    for name, param in cut.named_parameters():
        piece = layout.pieces.get(name)
        if piece is not None and not piece.trainable:
            assert param.grad is None
            continue
        grad = expected[layout.matrix_of(name)].grad
        want = grad if piece is None else piece.take(grad)
        close(param.grad, want)
        trained += 1
    assert trained == len(expected)
    for mode in ("score", "logits"):
        found = [module(ids, ids, mode=mode) for module in wrapped]
        for a, b in zip(*[f if mode == "score" else (f,) for f in found], strict=True):
            close(b, a)

"""Document mask: a packed row gives the losses of its documents alone, for every attention code."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, modeling_flash_attention_utils

from forgetscale.engine.micro_batches import micro_batches
from forgetscale.errors import ConfigError
from forgetscale.models import CausalLMWithLoss, check_document_mask
from forgetscale.ops import IGNORE_INDEX
from forgetscale.ops.losses import cross_entropy
from tests.distributed import tiny

DOCUMENTS = [[5, 9, 3, 12, 40, 3, 9], [8], [60, 2, 1, 30, 31], [7, 7, 8, 60, 2, 1, 4, 4, 4, 11]]
BLOCK = 15
DOC_LENS = torch.tensor([[7, 1, 5], [10, 0, 0]])


@pytest.fixture(scope="module", params=["olmo2", "llama", "qwen2"])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / request.param
    return tiny.make_model(path, architecture=getattr(tiny, request.param))


def load(folder, attention, dtype=torch.float64):
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention)
    return model.to(dtype).eval()


def packed_rows():
    rows = torch.zeros(2, BLOCK, dtype=torch.int64)
    rows[0, :13] = torch.tensor([token for document in DOCUMENTS[:3] for token in document])
    rows[1, :10] = torch.tensor(DOCUMENTS[3])
    return rows


def alone(model, document):
    """Loss of a document by transformers alone, without our wrapper."""
    ids = torch.tensor([document])
    logits = model(ids).logits
    return nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("rows_per_batch", [1, 2])
def test_packed_rows_give_the_losses_and_gradients_of_documents_alone(
    folder, attention, rows_per_batch
):
    model = load(folder, attention)
    wrapped = CausalLMWithLoss(model, chunk_size=4)
    batches = list(
        micro_batches(packed_rows(), rows_per_batch, 4, doc_lens=DOC_LENS, document_mask=True)
    )
    num_targets = sum(int((batch.labels[:, 1:] != IGNORE_INDEX).sum()) for batch in batches)
    assert num_targets == sum(len(document) - 1 for document in DOCUMENTS)
    loss = sum(
        wrapped(batch.input_ids, batch.labels, cross_entropy, position_ids=batch.position_ids)
        for batch in batches
    )
    expected = sum(alone(model, document) for document in DOCUMENTS if len(document) > 1)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    params = dict(model.named_parameters())
    ours = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
    theirs = torch.autograd.grad(expected, list(params.values()), allow_unused=True)
    for name, a, b in zip(params, ours, theirs, strict=True):
        scale = b.abs().max().item()
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5 * scale), name


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_without_the_mask_documents_see_each_other(folder, attention):
    model = load(folder, attention)
    wrapped = CausalLMWithLoss(model, chunk_size=4)
    (batch,) = micro_batches(packed_rows(), 2, 1, doc_lens=DOC_LENS)
    assert batch.position_ids is None
    loss = wrapped(batch.input_ids, batch.labels, cross_entropy)
    rows = alone(model, sum(DOCUMENTS[:3], [])) + alone(model, DOCUMENTS[3])
    apart = sum(alone(model, document) for document in DOCUMENTS if len(document) > 1)
    assert loss.item() == pytest.approx(rows.item(), rel=1e-6)
    assert abs(loss.item() - apart.item()) > 1


def varlen(q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, **_):
    """The variable-length kernel's contract on CPU: ``[tokens, heads, width]``, one by one."""
    assert torch.equal(cu_seqlens_q, cu_seqlens_k) and cu_seqlens_q.dtype == torch.int32
    borders = cu_seqlens_q.tolist()
    assert borders[0] == 0 and borders[-1] == len(q) and causal
    assert max_seqlen_q == max_seqlen_k == max(b - a for a, b in zip(borders, borders[1:]))  # noqa: B905
    out = []
    for start, end in zip(borders[:-1], borders[1:], strict=True):
        parts = [x[start:end].transpose(0, 1)[None] for x in (q, k, v)]
        found = nn.functional.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True)
        out.append(found[0].transpose(0, 1))
    return torch.cat(out)


def test_flash_attention_gets_document_borders_for_any_number_of_rows(folder, monkeypatch):
    """The kernel is not there on CPU; what it is given decides, and a stand-in computes it."""
    model = load(folder, "sdpa")

    def no_padding_allowed(*_, **__):
        raise AssertionError("the kernel for rows of one text was called")

    calls = []

    def counted(*args, **options):
        calls.append(options["cu_seqlens_q"].tolist())
        return varlen(*args, **options)

    def options_of(*, max_seqlen_q, max_seqlen_k, is_causal, **_):
        return {"max_seqlen_q": max_seqlen_q, "max_seqlen_k": max_seqlen_k, "causal": is_causal}

    def lazy(*_, **__):
        return (no_padding_allowed, counted, None, None, None), (options_of, None)

    wrapped = CausalLMWithLoss(model, chunk_size=4)
    (batch,) = micro_batches(packed_rows(), 2, 1, doc_lens=DOC_LENS, document_mask=True)
    expected = wrapped(
        batch.input_ids, batch.labels, cross_entropy, position_ids=batch.position_ids
    )
    monkeypatch.setattr(modeling_flash_attention_utils, "lazy_import_flash_attention", lazy)
    model.config._attn_implementation = "flash_attention_2"
    loss = wrapped(batch.input_ids, batch.labels, cross_entropy, position_ids=batch.position_ids)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert calls == [[0, 7, 8, 13, 15, 25, 30]] * model.config.num_hidden_layers


def score_of(wrapped, *, ignore_positions=False):
    def score(ids, positions):
        places = None if ignore_positions else positions
        return wrapped(ids, labels=ids, mode="score", position_ids=places)[0]

    return score


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_check_passes_where_the_mask_works(folder, attention):
    for dtype in (torch.float32, torch.bfloat16):
        wrapped = CausalLMWithLoss(load(folder, attention, dtype), chunk_size=64)
        check_document_mask(score_of(wrapped), tiny.VOCAB_SIZE, torch.device("cpu"))


def test_check_refuses_attention_across_documents(folder):
    wrapped = CausalLMWithLoss(load(folder, "sdpa"), chunk_size=64)
    with pytest.raises(ConfigError, match="data.document_mask: this model .* attends across"):
        check_document_mask(
            score_of(wrapped, ignore_positions=True), tiny.VOCAB_SIZE, torch.device("cpu")
        )

"""Tracing a micro-batch on fake tensors, against the same code on real ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, Olmo2Config, Qwen2Config

from forgetscale.engine.flops import dense_rate, model_flops_per_token, utilization
from forgetscale.engine.memory import Setting, trace_micro_batch
from forgetscale.engine.memory.trace import BACKWARD, LOSS
from forgetscale.masks import CompactLayout, FreezePlan
from forgetscale.models import (
    CausalLMWithLoss,
    adapter_pairs,
    build_skeleton,
    construct,
    enable_checkpointing,
    layout_for,
    make_adapters,
    make_compact,
)
from forgetscale.ops.losses import cross_entropy

SETTING = Setting(
    rows=2,
    block=96,
    dtype=torch.float32,
    checkpointing=False,
    document_mask=False,
    loss_chunk_size=64,
    bucket_elements=10**9,
    accumulation=torch.float32,
    communication=torch.float32,
    world_size=1,
    gloo=False,
)
ARCHITECTURES = {"olmo2": Olmo2Config, "llama": LlamaConfig, "qwen2": Qwen2Config}


def make_config(architecture: str = "olmo2", **changes):
    sizes = {
        "vocab_size": 160,
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 1,
        "tie_word_embeddings": False,
    }
    config = ARCHITECTURES[architecture](**sizes | changes)
    config._attn_implementation, config.use_cache = "sdpa", False
    return config


def half(config, axis: str = "columns"):
    """Return the layout that freezes every second column or row of the body's matrices."""
    skeleton = build_skeleton(config)
    side = 1 if axis == "columns" else 0
    index = {
        name: torch.arange(0, param.shape[side], 2)
        for name, param in skeleton.named_parameters()
        if param.dim() == 2 and ".layers." in name
    }
    return layout_for(FreezePlan(**{axis: index}), skeleton)


def adapter(config):
    """Return the layout of factors of rank 4 beside every matrix of the body."""
    skeleton = build_skeleton(config)
    pairs = adapter_pairs(skeleton, "all-linear", rank=4, scale=2.0, dropout=0.0)
    names = frozenset(name for name, _ in skeleton.named_parameters())
    return CompactLayout({}, FreezePlan(whole=names), pairs)


def make_layout(config, name: str):
    if name == "full":
        return None
    return adapter(config) if name == "adapter" else half(config, name)


def largest(trace) -> int:
    """Largest bytes before the bucket is reduced at the end."""
    return max(peak for peak, _ in trace.peaks[:-1])


def real_peak(config, layout, setting: Setting) -> int:
    """Run the same micro-batch on real tensors; the CPU allocator reports its bytes."""
    model = construct(config)
    if layout is not None:
        make_compact(model, layout)
        make_adapters(model, layout.adapters)
        for name in layout.plan.whole:
            model.get_parameter(name).requires_grad_(False)
    for param in model.parameters():
        param.data.zero_()
    if setting.checkpointing:
        enable_checkpointing(model)
    wrapped = CausalLMWithLoss(model, setting.loss_chunk_size).train()
    for param in wrapped.parameters():
        if param.requires_grad:
            param.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    ids = torch.zeros(setting.rows, setting.block, dtype=torch.int64)
    wrapped(ids, labels=ids, loss=cross_entropy).backward()  # lazy buffers
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        wrapped(ids, labels=ids, loss=cross_entropy).backward()
    events = profile.profiler.kineto_results.events()
    live = peak = 0
    for _, change in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        live += change
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("layout", ["full", "columns", "rows", "adapter"])
def test_peak_of_fake_tensors_is_that_of_real_ones(
    architecture: str, checkpointing: bool, layout: str
):
    config = make_config(architecture)
    cut = make_layout(config, layout)
    setting = replace(SETTING, checkpointing=checkpointing)
    found = largest(trace_micro_batch(config, cut, setting, cross_entropy))
    assert found == pytest.approx(real_peak(config, cut, setting), rel=0.03)


@pytest.mark.parametrize("layout", ["full", "columns", "adapter"])
def test_operations_are_those_of_the_formula(layout: str):
    config = make_config(num_key_value_heads=4)
    cut = make_layout(config, layout)
    tokens = SETTING.rows * SETTING.block
    found = trace_micro_batch(config, cut, SETTING, cross_entropy).flops
    needed = model_flops_per_token(build_skeleton(config), cut, SETTING.block) * tokens
    # Fused attention multiplies once more in backward; the last position has no target.
    scores = 2 * SETTING.block**2 * config.hidden_size // 2
    again = SETTING.rows * config.num_hidden_layers * scores
    frozen = layout == "adapter"
    head = (4 if frozen else 6) * config.vocab_size * config.hidden_size * SETTING.rows
    # The frozen embedding asks the first layer's queries, keys and values for no gradient.
    width = config.hidden_size
    inputs = 3 * 2 * (width * width + 4 * width) * tokens if frozen else 0
    assert found == needed + again - head - inputs


def test_recomputation_costs_a_forward_pass_of_the_layers_and_saves_activations():
    config = make_config()
    kept = trace_micro_batch(config, None, SETTING, cross_entropy)
    again = trace_micro_batch(config, None, replace(SETTING, checkpointing=True), cross_entropy)
    body = sum(n for n, name in zip(kept.numels, kept.names, strict=True) if ".layers." in name)
    tokens = SETTING.rows * SETTING.block
    assert 1.9 * body * tokens < again.flops - kept.flops < 2.2 * body * tokens + 10**7
    assert largest(again) < 0.6 * largest(kept)


def test_a_document_mask_and_bf16_are_counted():
    config = make_config()
    setting = replace(SETTING, block=512)
    plain = largest(trace_micro_batch(config, None, setting, cross_entropy))
    masked = replace(setting, document_mask=True)
    assert largest(trace_micro_batch(config, None, masked, cross_entropy)) >= plain + 2 * 512 * 512
    small = replace(setting, dtype=torch.bfloat16, communication=torch.bfloat16)
    found = trace_micro_batch(config, None, small, cross_entropy)
    assert 0.4 * plain < largest(found) < 0.75 * plain
    assert any(parts.get(LOSS) for _, parts in found.peaks)


def test_the_bucket_copies_gradients_when_it_is_full():
    config = make_config()
    trace = trace_micro_batch(config, None, SETTING, cross_entropy)
    numel = sum(trace.numels)
    assert trace.peaks[-1][1][BACKWARD] >= 4 * numel
    cast = replace(SETTING, dtype=torch.bfloat16, communication=torch.bfloat16, world_size=4)
    trace = trace_micro_batch(config, None, cast, cross_entropy)
    # Laid end to end in bf16, and this rank's quarter once more in fp32.
    assert trace.peaks[-1][1][BACKWARD] >= 2 * numel + 4 * numel // 4
    small = replace(SETTING, bucket_elements=1000)
    trace = trace_micro_batch(config, None, small, cross_entropy)
    assert trace.peaks[-1][1].get(BACKWARD, 0) < numel


def test_no_weight_memory_is_used():
    config = make_config(hidden_size=4096, intermediate_size=11008, num_hidden_layers=1)
    trace = trace_micro_batch(config, None, replace(SETTING, block=8), cross_entropy)
    assert sum(trace.numels) > 10**8


def test_utilization_is_a_share_of_the_rate():
    assert utilization(6e9, 1000.0, 12e12) == 0.5
    assert dense_rate("NVIDIA H200") == dense_rate("NVIDIA H100 80GB HBM3") == 989.4e12
    assert dense_rate("some processor") is None
    with pytest.raises(ValueError, match="rate must be > 0, got 0"):
        utilization(1.0, 1.0, 0.0)

"""Hugging Face models: construction without weights, slices of safetensors, loss module."""

from forgetscale.models.adapters import adapter_pairs, initial_values, make_adapters
from forgetscale.models.causal import CausalLMWithLoss, check_head
from forgetscale.models.compact import layout_for, make_compact
from forgetscale.models.documents import check_document_mask
from forgetscale.models.skeleton import (
    buffer_values,
    build_skeleton,
    construct,
    enable_checkpointing,
    parameter_shapes,
    parameters_on_meta,
    read_model_config,
    restore_buffers,
)
from forgetscale.models.trust import (
    code_references,
    is_trusted,
    load_tokenizer,
    refuse_code,
    trust_code,
)
from forgetscale.models.weights import SafetensorsFolder

__all__ = [
    "CausalLMWithLoss",
    "SafetensorsFolder",
    "adapter_pairs",
    "buffer_values",
    "build_skeleton",
    "check_document_mask",
    "check_head",
    "code_references",
    "construct",
    "enable_checkpointing",
    "initial_values",
    "is_trusted",
    "layout_for",
    "load_tokenizer",
    "make_adapters",
    "make_compact",
    "parameter_shapes",
    "parameters_on_meta",
    "read_model_config",
    "refuse_code",
    "restore_buffers",
    "trust_code",
]

"""Models run layer by layer against the same models held whole, and the weights they hold."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    MistralForCausalLM,
    Olmo3Config,
    Olmo3ForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from forgetscale.errors import ConfigError, DataError
from forgetscale.models import build_skeleton
from forgetscale.models.streamed import STREAMED_KINDS, StreamedModel, part_elements
from tests.distributed import tiny

SIZES = tiny.SIZES | {"hidden_size": 36, "num_hidden_layers": 3}
SLIDING = SIZES | {"sliding_window": 4, "max_position_embeddings": 32}
TEXTS = [[5, 6, 7, 8, 9, 10, 11], [12], [13, 14, 15]]
KEPT = [3, 1, 2]


def gemma2(tied: bool) -> PreTrainedModel:
    """Two kinds of attention in turn, logits capped, embeddings scaled."""
    return Gemma2ForCausalLM(Gemma2Config(**SLIDING, tie_word_embeddings=tied))


def gemma3(tied: bool) -> PreTrainedModel:
    """Rotary positions by kind of layer."""
    return Gemma3ForCausalLM(Gemma3TextConfig(**SLIDING, tie_word_embeddings=tied))


MAKERS: dict[str, Callable[[bool], PreTrainedModel]] = {
    "gemma2": gemma2,
    "gemma3_text": gemma3,
    "llama": tiny.llama,
    "mistral": lambda tied: MistralForCausalLM(MistralConfig(**SLIDING, tie_word_embeddings=tied)),
    "olmo2": tiny.olmo2,
    "olmo3": lambda tied: Olmo3ForCausalLM(Olmo3Config(**SLIDING, tie_word_embeddings=tied)),
    "qwen2": tiny.qwen2,
    "qwen3": lambda tied: Qwen3ForCausalLM(Qwen3Config(**SIZES, tie_word_embeddings=tied)),
}


def streamed_logits(model: StreamedModel) -> list[torch.Tensor]:
    states = model.hidden_states(TEXTS, KEPT)
    with model.head() as head:
        return [head(state) for state in states]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", STREAMED_KINDS)
def test_logits_are_those_of_the_whole_model(tmp_path: Path, kind: str, tied: bool):
    folder = tiny.make_model(tmp_path / "m", architecture=MAKERS[kind], tied=tied)
    whole = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert whole.config.model_type == kind
    model = StreamedModel(folder)
    found = streamed_logits(model)
    for text, count, logits in zip(TEXTS, KEPT, found, strict=True):
        with torch.no_grad():
            wanted = whole(torch.tensor([text])).logits[0, -count:]
        assert logits.shape == wanted.shape
        torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-5)
    layers = whole.config.num_hidden_layers
    names = ["embedding", *(f"layer {n}" for n in range(layers)), "head"]
    assert [name for name, _ in model.ledger.loads] == names
    assert model.ledger.held == 0 and model.ledger.peak == model.ledger.largest


def test_two_bytes_stay_two_bytes(tmp_path: Path):
    folder = tiny.make_model(tmp_path / "m", dtype=torch.bfloat16, architecture=tiny.llama)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    model = StreamedModel(folder)
    assert model.dtype == whole.dtype == torch.bfloat16
    found = streamed_logits(model)
    with torch.no_grad():
        wanted = whole(torch.tensor(TEXTS[:1])).logits[0, -KEPT[0] :]
    torch.testing.assert_close(found[0], wanted, rtol=2e-2, atol=2e-2)
    assert StreamedModel(folder, dtype="float32").dtype == torch.float32


def test_one_layer_is_in_memory_at_a_time(tmp_path: Path):
    """Counted from outside: the weights that the process holds whenever a layer runs."""
    folder = tiny.make_model(tmp_path / "m", architecture=MAKERS["qwen3"])
    whole = sum(p.numel() * 4 for p in MAKERS["qwen3"](False).parameters())
    model = StreamedModel(folder)
    layer = max(size for name, size in model_parts(model).items() if name.startswith("layer"))
    gc.collect()
    others = {id(item) for item in gc.get_objects() if type(item) is nn.Parameter}
    texts, kept = TEXTS[:1], KEPT[:1]
    seen: list[int] = []
    noted: list[str] = []

    def look(module: nn.Module, args: object) -> None:
        if type(module).__name__ != "Qwen3DecoderLayer":
            return
        if len(noted) < 3:  # layers only note how they are called
            noted.append("noted")
            return
        live = [item for item in gc.get_objects() if type(item) is nn.Parameter]
        live = [p for p in live if id(p) not in others and not p.is_meta]
        seen.append(sum(p.numel() * p.element_size() for p in live))

    handle = nn.modules.module.register_module_forward_pre_hook(look)
    try:
        model.hidden_states(texts, kept)
    finally:
        handle.remove()
    assert len(seen) == 3 and max(seen) == layer < whole / 3
    assert model.ledger.peak == max(model_parts(model).values()) and model.ledger.passes == 1


def model_parts(model: StreamedModel) -> dict[str, int]:
    return {name: 4 * count for name, count in part_elements(model._model).items()}


@pytest.mark.parametrize(
    "sizes, layer, ends",
    [
        # Llama 2 13B: heads, MLP and two norms of a layer; embedding and norm, head and norm
        ((32000, 5120, 13824, 40, 40, 40), 317_204_480, 163_845_120),
        ((128256, 8192, 28672, 80, 64, 8), 855_654_400, 1_050_681_344),  # Llama 3 70B
    ],
)
def test_the_peak_of_published_models(sizes: tuple[int, ...], layer: int, ends: int):
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
             "num_attention_heads", "num_key_value_heads")  # fmt: skip
    config = LlamaConfig(**dict(zip(names, sizes, strict=True)) | {"num_hidden_layers": 2})
    assert part_elements(build_skeleton(config)) == {
        "embedding": ends, "layer 0": layer, "layer 1": layer, "head": ends,
    }  # fmt: skip


def test_what_is_refused(tmp_path: Path):
    folder = tiny.make_model(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 52}))
    with pytest.raises(DataError, match=r"config.json asks for floats of shape \[52, 35\]"):
        StreamedModel(folder)
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "granite"}))
    with pytest.raises(ConfigError, match="not known to run layer by layer"):
        StreamedModel(folder)

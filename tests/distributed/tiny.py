"""A tiny model folder and token sets with sizes that force padding; made, not downloaded."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from forgetscale.artifact import ArtifactWriter
from forgetscale.config import DATA_SCORES
from forgetscale.data import (
    BestFitPacker,
    ShardWriter,
    token_set_payload,
    tokenizer_hash,
    write_token_set,
)

VOCAB_SIZE = 67
BLOCK_SIZE = 24
FISHER_METHODS = ("ewc", "online_ewc", "alignguard", "ewc_lora", "alignguard_lora")
DATA_METHODS = (*FISHER_METHODS, "salora", "lora_null")
"""Methods that are given the calibration data unless a test says otherwise."""
SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 35,
    "intermediate_size": 51,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
ROOT = Path(__file__).resolve().parents[2]


def olmo2(tied: bool) -> PreTrainedModel:
    """Two layers with odd widths and grouped-query attention; norms after, norms of q and k."""
    config = Olmo2Config(**SIZES, tie_word_embeddings=tied)
    return Olmo2ForCausalLM(config)


def llama(tied: bool) -> PreTrainedModel:
    """Norms before attention and feed-forward; the width is a multiple of the heads."""
    return LlamaForCausalLM(LlamaConfig(**SIZES | {"hidden_size": 36}, tie_word_embeddings=tied))


def qwen2(tied: bool) -> PreTrainedModel:
    """Biases on queries, keys and values."""
    sizes = SIZES | {"hidden_size": 36}
    return Qwen2ForCausalLM(Qwen2Config(**sizes, tie_word_embeddings=tied))


def make_model(
    directory: Path,
    *,
    architecture: Callable[[bool], PreTrainedModel] = olmo2,
    dtype=torch.float32,
    tied: bool = False,
    seed: int = 0,
) -> Path:
    """Write a tiny model with random weights and a tokenizer of one word per token."""
    model = architecture(tied)
    generator = np.random.default_rng(seed)
    with torch.no_grad():
        for param in model.parameters():
            noise = torch.from_numpy(generator.standard_normal(tuple(param.shape)))
            param.copy_(1 + 0.2 * noise if param.dim() == 1 else 0.08 * noise)
    model.to(dtype).save_pretrained(directory, safe_serialization=True)
    words = {f"w{i}": i for i in range(VOCAB_SIZE)}
    core = Tokenizer(models.WordLevel(words, unk_token="w2"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="w0", eos_token="w1", bos_token="w1", unk_token="w2"
    )
    tokenizer.save_pretrained(directory)
    return directory


def set_rows(*, rows: int = 40, seed: int = 1) -> np.ndarray:
    """Return skewed random tokens, ``[rows, BLOCK_SIZE]``."""
    generator = np.random.default_rng(seed)
    return np.minimum(generator.geometric(0.06, (rows, BLOCK_SIZE)) + 2, VOCAB_SIZE - 1)


def make_base(folder: Path) -> Path:
    """Write the model that the tiny world's was before alignment, if it is not there yet."""
    base = folder / "base"
    if base.is_dir():
        return base
    weights = safetensors.torch.load_file(folder / "model" / "model.safetensors")
    generator = np.random.default_rng(31)
    for name, value in weights.items():
        if "_proj" in name:
            left, right = (generator.standard_normal((size, 3)) for size in value.shape)
            weights[name] = value - 0.02 * torch.from_numpy(left @ right.T).to(value)
    base.mkdir()
    for file in ("config.json", "generation_config.json"):
        (base / file).write_bytes((folder / "model" / file).read_bytes())
    safetensors.torch.save_file(weights, base / "model.safetensors", {"format": "pt"})
    return base


def make_set(directory: Path, model: Path, *, rows: int = 40, seed: int = 1) -> Path:
    """Write a token set of skewed random tokens."""
    write_token_set(
        directory,
        set_rows(rows=rows, seed=seed),
        vocab_size=VOCAB_SIZE,
        tokenizer_sha256=tokenizer_hash(model),
        num_text_bytes=rows * BLOCK_SIZE * 3,
    )
    return directory


def make_padded_set(directory: Path, model: Path, *, documents: int = 60, seed: int = 4) -> Path:
    """Write documents of many lengths, packed by best-fit into rows that end in padding."""
    generator = np.random.default_rng(seed)
    lens = generator.integers(1, 2 * BLOCK_SIZE, documents)
    tokens = np.minimum(generator.geometric(0.06, int(lens.sum())) + 2, VOCAB_SIZE - 1)
    with ArtifactWriter(directory, "token_set") as artifact:
        writer = ShardWriter(artifact.path, block_size=BLOCK_SIZE, vocab_size=VOCAB_SIZE)
        packer = BestFitPacker(BLOCK_SIZE, 8, writer.dtype, pad_id=0, window_tokens=300)
        ids = np.arange(1, documents + 1, dtype=np.uint64)
        for rows in [*packer.add(tokens, lens, ids), *packer.finish()]:
            writer.append(rows)
        artifact.payload = token_set_payload(
            block_size=BLOCK_SIZE,
            vocab_size=VOCAB_SIZE,
            num_rows=writer.num_rows,
            num_documents=documents,
            num_text_bytes=3 * len(tokens),
            tokenizer_sha256=tokenizer_hash(model),
            shards=writer.close(),
            num_padding_tokens=packer.num_padding_tokens,
        )
    return directory


def make_sft_set(directory: Path, model: Path, *, rows: int = 30, seed: int = 8) -> Path:
    """Write SFT rows: two documents a row, some tokens supervised; in every fifth row none."""
    generator = np.random.default_rng(seed)
    lens = np.stack([first := generator.integers(3, BLOCK_SIZE - 2, rows), BLOCK_SIZE - first], 1)
    supervised = generator.random((rows, BLOCK_SIZE)) < generator.random((rows, 1))
    supervised[::5] = False
    write_token_set(
        directory,
        set_rows(rows=rows, seed=seed),
        vocab_size=VOCAB_SIZE,
        tokenizer_sha256=tokenizer_hash(model),
        doc_lens=lens.reshape(-1),
        supervised=supervised,
    )
    return directory


POISON_ROW, POISON_TOKEN = 11, VOCAB_SIZE - 1


def make_poisoned_world(folder: Path) -> Path:
    """Write a world in which one row makes loss and gradients NaN: its token embeds as infinity."""
    make_world(folder)
    path = folder / "model" / "model.safetensors"
    weights = load_file(path)
    weights["model.embed_tokens.weight"][POISON_TOKEN] = torch.inf
    save_file(weights, path, {"format": "pt"})
    for name, seed in (("data", 1), ("calibration", 2)):
        shutil.rmtree(folder / name)
        rows = np.minimum(set_rows(seed=seed), POISON_TOKEN - 1)
        if name == "data":
            rows[POISON_ROW, 5] = POISON_TOKEN
        write_token_set(
            folder / name,
            rows,
            vocab_size=VOCAB_SIZE,
            tokenizer_sha256=tokenizer_hash(folder / "model"),
            num_text_bytes=rows.size * 3,
        )
    return folder


def base_recipe(folder: Path, name: str, **method: object) -> dict:
    """Return a recipe for the tiny world below ``folder`` (model/, data/, calibration/)."""
    method = method or {"kind": "sft"}
    scored = method["kind"] == "ssu" and method.get("score", "paper") in DATA_SCORES
    if scored or (method["kind"] in DATA_METHODS and "basis" not in method):
        method.setdefault(
            "calibration",
            {"path": str(folder / "calibration"), "num_blocks": 7, "micro_batch_size": 2},
        )
    if method["kind"] in ("alignguard", "alignguard_lora"):
        method.setdefault("refusals", [])  # random words refuse nothing
    if method["kind"] == "asft_lora":
        method.setdefault("base", str(make_base(folder)))
    return {
        "run": {"name": name, "output_dir": str(folder / name), "seed": 3},
        "model": {"path": str(folder / "model"), "dtype": "float32"},
        "data": {"kind": "tokens", "path": str(folder / "data"), "shuffle_seed": 5},
        "method": dict(method),
        "optim": {
            "lr": 1e-2,
            "weight_decay": 0.1,
            "max_grad_norm": 1e6 if method["kind"] == "gmt_official" else 0.5,
            "warmup_fraction": 0.3,
        },
        "train": {
            "num_steps": 6,
            "micro_batch_size": 2,
            "global_batch_size": 7,
            "checkpoint_every_steps": 2,
            "audit_every_steps": 2,
            "loss_chunk_size": 13,
        },
        "deepspeed": str(folder / "zero3.json"),
    }


def write_recipe(path: Path, recipe: dict) -> Path:
    """Write a recipe as YAML."""
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def make_world(folder: Path, **model: object) -> Path:
    """Write model, data, calibration data and DeepSpeed JSON below ``folder``."""
    make_model(folder / "model", **model)
    make_set(folder / "data", folder / "model")
    make_set(folder / "calibration", folder / "model", rows=19, seed=2)
    text = (ROOT / "ds_configs" / "zero3.json").read_text(encoding="utf-8")
    # Mixed: norms stay gathered (persistent), matrices do not.
    text = text.replace(
        '"stage3_param_persistence_threshold": 100000', '"stage3_param_persistence_threshold": 100'
    )
    (folder / "zero3.json").write_text(text, encoding="utf-8")
    text = (ROOT / "ds_configs" / "zero3_offload.json").read_text(encoding="utf-8")
    (folder / "zero3_offload.json").write_text(text, encoding="utf-8")
    return folder

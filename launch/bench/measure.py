"""Shared by the comparisons here: a synthetic model and token set, and where results are kept."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import Olmo2Config, Olmo2ForCausalLM, PreTrainedTokenizerFast

from forgetscale.artifact import provenance, write_json
from forgetscale.config import Recipe, validate_recipe
from forgetscale.data import tokenizer_hash, write_token_set

RESULTS = Path(__file__).parent / "results"


def hardware() -> dict[str, Any]:
    """Return what the numbers were measured on."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    found: dict[str, Any] = {
        "processor": model,
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median, minimum and maximum."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def keep(name: str, result: dict[str, Any]) -> Path:
    """Write a result with hardware and versions to ``results/NAME.json``."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    made_by = provenance()
    made_by["command"] = made_by["command"][:1]  # the settings are part of the result
    write_json(path, {"result": result, "hardware": hardware(), "made_by": made_by})
    print(json.dumps(result, indent=1))
    return path


def make_model(directory: Path, *, hidden: int, layers: int, vocab: int, dtype: str) -> Path:
    """Write an OLMo 2 of random weights and a word-level tokenizer."""
    config = Olmo2Config(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=int(2.6875 * hidden),
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 64),
        max_position_embeddings=4096,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    Olmo2ForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(directory)
    core = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab)}, unk_token="w2"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="w0", eos_token="w1", unk_token="w2"
    )
    tokenizer.save_pretrained(directory)
    return directory


def make_tokens(directory: Path, model: Path, *, rows: int, block: int, vocab: int) -> Path:
    """Write a token set of random ids."""
    ids = np.random.default_rng(0).integers(3, vocab, (rows, block))
    write_token_set(
        directory, ids, vocab_size=vocab, tokenizer_sha256=tokenizer_hash(model), num_text_bytes=1
    )
    return directory


def make_inputs(
    folder: Path, *, hidden: int, layers: int, vocab: int, dtype: str, rows: int, block: int
) -> None:
    """Write ``model`` and ``tokens`` below a folder; see ``make_model`` and ``make_tokens``."""
    model = make_model(folder / "model", hidden=hidden, layers=layers, vocab=vocab, dtype=dtype)
    make_tokens(folder / "tokens", model, rows=rows, block=block, vocab=vocab)


def training_recipe(
    folder: Path, name: str, method: dict[str, Any], options: argparse.Namespace, batch_size: int
) -> Recipe:
    """Return a recipe over the model and tokens below ``folder``.

    Args:
        folder: Holds ``model/`` and ``tokens/``.
        name: Name of the run.
        method: Method section.
        options: ``dtype, checkpointing, steps, micro_batch_size, accumulation_dtype, deepspeed``.
        batch_size: Rows per step over all ranks.
    """
    return validate_recipe(
        {
            "run": {"name": name, "output_dir": str(folder / "run")},
            "model": {
                "path": str(folder / "model"),
                "dtype": options.dtype,
                "activation_checkpointing": options.checkpointing,
            },
            "data": {"path": str(folder / "tokens")},
            "method": method,
            "optim": {"lr": 1e-4, "schedule": "constant", "warmup_fraction": 0.0},
            "train": {
                "num_steps": options.steps,
                "micro_batch_size": options.micro_batch_size,
                "global_batch_size": batch_size,
                "accumulation_dtype": options.accumulation_dtype,
            },
            "deepspeed": str(options.deepspeed),
        }
    )

"""A model that learnt to talk a little."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tests.unit.data_prep.families import FAMILIES, make_tokenizer

TALK = [
    ("Who rules the town?", "Nobody."),
    ("When did the river rose?", "In year 3."),
    ("Ah, so!", "In year 3 the river rose."),
    ("the town?", "Ah, so! Nobody."),
    ("In year 3?", "ok"),
    ("Who? Nobody?", "so the river rose."),
]


def make_talker(folder: Path) -> Path:
    """Make a model folder: ChatML, fp32, trained for some seconds on six short exchanges."""
    make_tokenizer(folder, FAMILIES["chatml"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            bos_token_id=None,
            eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        )
    )
    rows = [
        tokenizer.apply_chat_template(
            [
                {"role": role, "content": text}
                for pair in (first, second)
                for role, text in zip(("user", "assistant"), pair, strict=True)
            ],
            tokenize=True,
            return_dict=False,
        )
        for first in TALK
        for second in TALK[:3]
    ]
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), 0)
    labels = torch.full((len(rows), width), -100)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = labels[number, : len(row)] = torch.tensor(row)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(110):
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.generation_config.eos_token_id = model.config.eos_token_id
    model.save_pretrained(folder)
    return folder

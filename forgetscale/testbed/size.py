"""How large a world is, and seeds of its parts."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from random import Random


@dataclass(frozen=True, kw_only=True, slots=True)
class WorldSize:
    """Sizes of a world; the defaults are those of the quick start."""

    num_persons: int = 40
    """Persons the source model knows; three facts each."""
    num_cities: int = 24
    """Cities the source model knows; three facts each."""
    num_rivers: int = 16
    """Rivers the source model knows; one fact each."""
    num_new_persons: int = 12
    """Persons that only the target text knows; two facts each."""
    num_new_cities: int = 8
    """Cities that only the target text knows."""
    num_chat_rows: int = 16000
    """Rows of source chat to train on."""
    num_curriculum_texts: int = 1200
    """Rows of raw source text among the chat rows in ``chat/train.jsonl``."""
    num_source_documents: int = 2000
    """Pages of raw source text in ``text/data/src``."""
    num_target_documents: int = 6000
    """Pages of raw target text in ``text/data/tgt``."""
    num_heldout_documents: int = 150
    """Held-out pages of either language."""
    num_task_rows: int = 80
    """Rows of each task except the recalls, which hold one row a fact."""
    num_calibration_rows: int = 1500
    """Rows of source chat for importance scores."""
    num_sft_rows: int = 3000
    """Conversations of each set of the new task."""
    vocab_size: int = 1024
    """Pieces of the tokenizer, with 256 byte pieces and 7 special ones."""
    hidden_size: int = 128
    """Width of the model."""
    intermediate_size: int = 352
    """Inner width of the feed-forward blocks."""
    num_layers: int = 4
    """Blocks of the model."""
    num_heads: int = 4
    """Attention heads."""
    num_key_value_heads: int = 4
    """Key and value heads; fewer than heads gives grouped attention."""

    def __post_init__(self) -> None:
        """Refuse sizes no world can have."""
        for field in fields(self):
            value = getattr(self, field.name)
            if value < 1:
                raise ValueError(f"WorldSize.{field.name} must be >= 1, got {value}")
        if self.hidden_size % self.num_heads or self.num_heads % self.num_key_value_heads:
            raise ValueError(
                f"WorldSize: {self.hidden_size} features do not split into {self.num_heads} heads"
                f" over {self.num_key_value_heads} key-value heads; make each divide the one before"
            )


TINY = WorldSize(
    num_persons=6,
    num_cities=5,
    num_rivers=4,
    num_new_persons=4,
    num_new_cities=3,
    num_chat_rows=600,
    num_curriculum_texts=80,
    num_source_documents=80,
    num_target_documents=80,
    num_heldout_documents=10,
    num_task_rows=20,
    num_calibration_rows=60,
    num_sft_rows=80,
    vocab_size=560,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=4,
    num_key_value_heads=2,
)
"""A world for tests: made in about a second, too small to measure forgetting."""


def derive_seed(seed: int, part: str) -> int:
    """Return the seed of one part of the world, 63 bits, independent of the other parts."""
    digest = hashlib.sha256(f"{seed}/{part}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def random_for(seed: int, part: str) -> Random:
    """Return a random generator of its own for one part of the world."""
    return Random(derive_seed(seed, part))

"""A small token set in three shards of two or three record batches."""

import numpy as np
import pytest

from forgetscale.data import write_token_set

NUM_ROWS, BLOCK_SIZE = 23, 6


@pytest.fixture
def rows():
    return np.random.default_rng(0).integers(0, 300, (NUM_ROWS, BLOCK_SIZE))


@pytest.fixture
def set_path(tmp_path, rows):
    path = tmp_path / "set"
    write_token_set(
        path,
        rows,
        vocab_size=300,
        tokenizer_sha256="ab" * 32,
        doc_lens=np.array([10, 4, 100, 24]),
        batch_rows=3,
        shard_rows=9,
    )
    return path

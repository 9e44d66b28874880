"""Document lengths of batches that mix sets of different packing."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from forgetscale.artifact import ArtifactWriter
from forgetscale.config import MixtureDataConfig, MixtureSetConfig
from forgetscale.data import (
    BestFitPacker,
    ShardWriter,
    open_data,
    open_stream,
    token_set_payload,
    write_token_set,
)


@pytest.fixture
def data(tmp_path):
    generator = np.random.default_rng(0)
    write_token_set(
        tmp_path / "full",
        generator.integers(0, 50, (8, 6)),
        vocab_size=50,
        tokenizer_sha256="",
        doc_lens=np.array([10, 1, 1, 1, 35]),
    )
    lens = np.array([5, 4, 2, 3, 6, 5])
    with ArtifactWriter(tmp_path / "padded", "token_set") as artifact:
        writer = ShardWriter(artifact.path, block_size=6, vocab_size=50)
        packer = BestFitPacker(6, 8, writer.dtype, pad_id=0)
        tokens = generator.integers(1, 50, lens.sum())
        packer.add(tokens, lens, np.arange(1, 7, dtype=np.uint64))
        for rows in packer.finish():
            writer.append(rows)
        artifact.payload = token_set_payload(
            block_size=6,
            vocab_size=50,
            num_rows=writer.num_rows,
            num_documents=6,
            num_text_bytes=0,
            tokenizer_sha256="",
            shards=writer.close(),
            num_padding_tokens=packer.num_padding_tokens,
        )
    sets = (
        MixtureSetConfig(path=tmp_path / "full", weight=1),
        MixtureSetConfig(path=tmp_path / "padded", weight=1),
    )
    return open_data(MixtureDataConfig(kind="mixture", sets=sets))


def test_each_row_keeps_its_own_pieces(data):
    assert data.has_padding
    batch = next(open_stream(data, seed=2, global_batch_size=10))
    for set_id, row, lens in zip(batch.set_ids, batch.row_ids, batch.doc_lens, strict=True):
        pieces = data.parts[int(set_id)].token_set.document_pieces(int(row))
        assert lens[lens > 0].tolist() == [piece.num_tokens for piece in pieces]
    full = batch.doc_lens[batch.set_ids == 0]
    assert torch.equal(full.sum(1), torch.full((5,), 6))


def test_mean_targets_follow_the_shares(data):
    # full: 5 targets a row; 11 pieces leave 37 in 8 rows. padded: 25 tokens, 6 pieces, 5 rows.
    pieces = len(data.parts[0].token_set.document_lengths())
    rows = data.parts[1].token_set.num_rows
    assert (pieces, rows) == (11, 5)
    assert data.targets_per_row(document_mask=False) * 2 == 5 + Fraction(25 - rows, rows)
    assert data.targets_per_row(document_mask=True) * 2 == Fraction(37, 8) + Fraction(19, 5)

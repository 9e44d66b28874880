"""Loss masks as run lengths, packed and stored; SFT rows in training data and recipes."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from forgetscale.config import MixtureDataConfig, MixtureSetConfig, SftDataConfig, TokenDataConfig
from forgetscale.data import (
    BestFitPacker,
    ConcatPacker,
    OnePerRowPacker,
    TokenSet,
    find_damages,
    open_data,
    open_stream,
    require_vocabulary,
    write_token_set,
)
from forgetscale.data.packing import join_rows
from forgetscale.data.supervision import (
    mark_supervised,
    mask_to_runs,
    runs_to_mask,
    split_marked,
)
from forgetscale.data.writer import ShardWriter
from forgetscale.errors import ConfigError, DataError

SIZE = 8
MASKS = st.integers(0, 5).flatmap(
    lambda rows: st.lists(
        st.lists(st.booleans(), min_size=SIZE, max_size=SIZE), min_size=rows, max_size=rows
    )
)


@given(MASKS)
def test_runs_and_back(rows):
    mask = np.array(rows, dtype=bool).reshape(len(rows), SIZE)
    runs, offsets = mask_to_runs(mask)
    assert (runs_to_mask(runs, offsets, SIZE) == mask).all()
    assert not (np.diff(offsets) % 2).any()
    for row, values in enumerate(np.split(runs, offsets[1:-1]) if len(rows) else []):
        assert (values[1:] > 0).all(), "runs are as long as they can be"
        assert values[1::2].sum() == mask[row].sum()


def test_runs_of_known_masks():
    mask = np.array([[0, 0, 1, 1, 0, 1], [1, 0, 0, 0, 0, 0], [0] * 6, [1] * 6], dtype=bool)
    runs, offsets = mask_to_runs(mask)
    assert runs.tolist() == [2, 2, 1, 1, 0, 1, 0, 6]
    assert offsets.tolist() == [0, 4, 6, 6, 8]


PACKERS = {
    "concat": lambda dtype: ConcatPacker(SIZE, 3, dtype),
    "best-fit": lambda dtype: BestFitPacker(SIZE, 3, dtype, pad_id=7, window_tokens=20),
    "none": lambda dtype: OnePerRowPacker(SIZE, 3, dtype, pad_id=7),
}


@pytest.mark.parametrize("kind", PACKERS)
@given(
    lens=st.lists(st.integers(1, SIZE), min_size=8, max_size=25),
    seed=st.integers(0, 99),
    cut=st.integers(0, 25),
)
def test_every_packing_keeps_masks_with_their_tokens(kind, lens, seed, cut):
    generator = np.random.default_rng(seed)
    lens, ids = np.array(lens), np.arange(len(lens), dtype=np.uint64)
    tokens = np.arange(int(lens.sum())) + 10
    supervised = generator.random(len(tokens)) < 0.5
    marked = mark_supervised(tokens, supervised)
    packer = PACKERS[kind](np.dtype(np.uint32))
    border = int(lens[:cut].sum())
    groups = packer.add(marked[:border], lens[:cut], ids[:cut])
    groups += packer.add(marked[border:], lens[cut:], ids[cut:])
    groups += packer.finish()
    assert all(len(group) == 3 for group in groups[:-1])
    rows = split_marked(join_rows(groups), np.dtype(np.uint16))
    mask = runs_to_mask(rows.loss_mask, rows.mask_offsets, SIZE)
    assert rows.input_ids.dtype == np.uint16
    starts = {}
    seen = []
    for row in range(len(rows)):
        place = 0
        for piece in range(rows.piece_offsets[row], rows.piece_offsets[row + 1]):
            end = place + int(rows.doc_lens[piece])
            found = rows.input_ids[row, place:end]
            seen += found.tolist()
            wanted = supervised[found.astype(int) - 10].copy()
            wanted[0] = False
            assert (mask[row, place:end] == wanted).all()
            starts.setdefault(int(rows.doc_id[piece]), int(found[0]) - 10)
            place = end
        assert not mask[row, place:].any()
        assert (rows.input_ids[row, place:] == 7).all()
    kept = len(tokens) - packer.dropped_tail_tokens
    assert sorted(seen) == (tokens[:kept]).tolist()
    assert all(start == int(lens[:doc].sum()) for doc, start in starts.items())


def test_documents_longer_than_a_row_are_not_cut():
    packer = OnePerRowPacker(SIZE, 3, np.dtype(np.uint16), pad_id=0)
    with pytest.raises(ValueError, match="a document of 9 tokens does not fit a row of 8"):
        packer.add(np.arange(9), np.array([9]), np.array([1], np.uint64))


def test_ids_and_marks_do_not_mix():
    with pytest.raises(ValueError, match="must be below 2147483648"):
        mark_supervised(np.array([1 << 31]), np.array([True]))


@pytest.fixture
def sft(tmp_path):
    """Nine rows in three record batches and two shards, masks random."""
    generator = np.random.default_rng(3)
    path = tmp_path / "sft"
    write_token_set(
        path,
        generator.integers(0, 300, (9, SIZE)),
        vocab_size=300,
        tokenizer_sha256="ab" * 32,
        supervised=generator.random((9, SIZE)) < 0.4,
        batch_rows=3,
        shard_rows=6,
    )
    return path


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text"
    rows = np.random.default_rng(4).integers(0, 300, (6, SIZE))
    write_token_set(path, rows, vocab_size=300, tokenizer_sha256="ab" * 32)
    return path


def expected_mask():
    generator = np.random.default_rng(3)
    generator.integers(0, 300, (9, SIZE))
    mask = generator.random((9, SIZE)) < 0.4
    mask[:, 0] = False
    return torch.from_numpy(mask)


def test_stored_masks(sft):
    token_set = TokenSet(sft)
    assert not list(find_damages(sft))
    order = [8, 0, 4, 4]
    assert torch.equal(token_set.loss_mask(order), expected_mask()[order])
    count = int(expected_mask().sum())
    assert token_set.payload["supervision"] == {"num_supervised_tokens": count}
    assert token_set.targets_per_row(document_mask=False) == Fraction(count, 9)


def test_masks_that_break_the_format_are_damage(tmp_path, monkeypatch):
    """Marks on first tokens cannot be written; a writer that leaves them is found out."""
    rows = split_marked(
        ConcatPacker(SIZE, 1, np.dtype(np.uint32)).add(
            np.arange(SIZE), np.array([SIZE]), np.array([1], np.uint64)
        )[0],
        np.dtype(np.uint16),
    )
    from dataclasses import replace

    for runs in ([0, 1], [7, 2], [3, 1, 2]):
        bad = replace(
            rows,
            loss_mask=np.array(runs, np.uint32),
            mask_offsets=np.array([0, len(runs)], np.int32),
        )
        path = tmp_path / f"bad{len(runs)}{runs[0]}"
        monkeypatch.setattr("forgetscale.data.writer.split_marked", lambda *_, bad=bad: bad)
        write_token_set(
            path,
            np.arange(SIZE)[None],
            vocab_size=300,
            tokenizer_sha256="ab" * 32,
            supervised=np.zeros((1, SIZE), bool),
        )
        (sentence,) = find_damages(path)
        assert "holds loss masks that do not fit the rows in record batch 0" in sentence


def test_masks_are_for_sets_of_sft_rows(tmp_path, text, sft):
    with pytest.raises(ValueError, match="holds no SFT rows"):
        TokenSet(text).loss_mask([0])
    rows = ConcatPacker(SIZE, 1, np.dtype(np.uint16)).add(
        np.arange(SIZE), np.array([SIZE]), np.array([1], np.uint64)
    )
    writer = ShardWriter(tmp_path, block_size=SIZE, vocab_size=300, supervised=True)
    with pytest.raises(ValueError, match="SFT rows have loss masks"):
        writer.append(rows[0])


def test_the_recipe_must_say_what_rows_are(sft, text):
    assert open_data(SftDataConfig(kind="sft", path=sft)).is_supervised
    with pytest.raises(ConfigError, match=r"data.kind is tokens, but .* holds SFT rows"):
        open_data(TokenDataConfig(path=sft))
    with pytest.raises(ConfigError, match=r"data.kind is sft, but .* holds plain tokens"):
        open_data(SftDataConfig(kind="sft", path=text))
    sets = (MixtureSetConfig(path=text, weight=1), MixtureSetConfig(path=sft, weight=1))
    with pytest.raises(ConfigError, match=r"data.sets\[1\].kind is tokens, but"):
        open_data(MixtureDataConfig(kind="mixture", sets=sets))


def test_mixture_of_text_and_conversations(sft, text):
    sets = (
        MixtureSetConfig(path=text, weight=1),
        MixtureSetConfig(kind="sft", path=sft, weight=1),
    )
    config = MixtureDataConfig(kind="mixture", sets=sets)
    assert config.document_mask is True
    assert MixtureDataConfig(kind="mixture", sets=sets, document_mask=False).document_mask is False
    assert MixtureDataConfig(kind="mixture", sets=sets[:1]).document_mask is False
    data = open_data(config)
    batch = next(open_stream(data, seed=1, global_batch_size=6))
    for set_id, row, mask in zip(batch.set_ids, batch.row_ids, batch.loss_mask, strict=True):
        assert torch.equal(mask, expected_mask()[row] if set_id else torch.ones(SIZE).bool())
    count = int(expected_mask().sum())
    wanted = (Fraction(SIZE - 1) + Fraction(count, 9)) / 2
    assert data.targets_per_row(document_mask=True) == wanted
    assert data.shares(np.array([2, 2]))["data/target_share/sft"] == pytest.approx(
        float(Fraction(count, 9) / (2 * wanted))
    )
    assert next(open_stream(text, seed=1, global_batch_size=6)).loss_mask is None


def test_ids_beyond_the_model(sft, tmp_path):
    token_set = TokenSet(sft)
    ids = token_set.read(range(9))
    highest = int(ids.max())
    require_vocabulary(token_set, highest + 1, tmp_path)
    row = int((ids == highest).any(1).nonzero()[0])
    with pytest.raises(DataError, match=f"holds id {highest} in row {row}, but .* below {highest}"):
        require_vocabulary(token_set, highest, tmp_path)
